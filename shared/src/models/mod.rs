//! Networks, written in the blocks of [`crate::ops`], with the tensor names of torchvision and timm.
//!
//! An [`Encoder`] is a backbone with or without a projection head. Features are the pooled rows before the head, embeddings
//! the rows of unit length after it.

mod arch;
mod cost;
mod efficientnet;
mod head;
mod inverted_residual;
mod mlp_head;
mod mobilenet_v3;
mod resnet;
mod vit;
mod xcit;

use std::sync::Arc;

use candle_core::{Device, Tensor};

pub use self::arch::Arch;
pub use self::cost::{Cost, cost, kept_values};
use self::efficientnet::{EfficientNet, Scaling};
pub use self::head::{HeadConfig, HeadKind};
pub use self::mlp_head::{MlpConfig, MlpHead, MlpLayer};
use self::mobilenet_v3::MobileNetV3;
use self::resnet::ResNet;
use self::vit::Vit;
pub use self::vit::VitOptions;
use self::xcit::Xcit;
use crate::ops::{self, Builder, Engine, Interpreter, Mode, ParameterStore, Pass, ProjectionHead};
use crate::{Error, Result};

/// The names and file shapes of all tensors of a model, in order, without making it: to recognise a checkpoint.
///
/// # Errors
/// Only if a tensor operation fails.
pub fn names_and_shapes(arch: Arch, head: Option<HeadConfig>) -> Result<Vec<(String, Vec<usize>)>> {
    let mut builder = Builder::describing();
    Layers::new(&mut builder, arch, head, VitOptions::default())?;
    Ok(builder.finish(0)?.names_and_shapes())
}

#[derive(Debug, Clone)]
enum Backbone {
    ResNet(ResNet),
    EfficientNet(EfficientNet),
    MobileNetV3(MobileNetV3),
    Vit(Vit),
    Xcit(Xcit),
}

impl Backbone {
    fn new(builder: &mut Builder, arch: Arch, vit: VitOptions) -> Result<Self> {
        Ok(match arch {
            Arch::ResNet18 => Self::ResNet(ResNet::basic(builder, [2, 2, 2, 2])?),
            Arch::ResNet34 => Self::ResNet(ResNet::basic(builder, [3, 4, 6, 3])?),
            Arch::ResNet50 => Self::ResNet(ResNet::bottleneck(builder, [3, 4, 6, 3], 1)?),
            Arch::ResNet101 => Self::ResNet(ResNet::bottleneck(builder, [3, 4, 23, 3], 1)?),
            Arch::ResNet152 => Self::ResNet(ResNet::bottleneck(builder, [3, 8, 36, 3], 1)?),
            Arch::ResNet50W2 => Self::ResNet(ResNet::bottleneck(builder, [3, 4, 6, 3], 2)?),
            Arch::EfficientNetB0 => Self::EfficientNet(EfficientNet::new(builder, &Scaling::b(1.0))?),
            Arch::EfficientNetB1 => Self::EfficientNet(EfficientNet::new(builder, &Scaling::b(1.1))?),
            Arch::EfficientNetLite0 => Self::EfficientNet(EfficientNet::new(builder, &Scaling::lite(1.0, 1.0))?),
            Arch::EfficientNetLite1 => Self::EfficientNet(EfficientNet::new(builder, &Scaling::lite(1.0, 1.1))?),
            Arch::EfficientNetLite2 => Self::EfficientNet(EfficientNet::new(builder, &Scaling::lite(1.1, 1.2))?),
            Arch::EfficientNetLite3 => Self::EfficientNet(EfficientNet::new(builder, &Scaling::lite(1.2, 1.4))?),
            Arch::EfficientNetLite4 => Self::EfficientNet(EfficientNet::new(builder, &Scaling::lite(1.4, 1.8))?),
            Arch::MobileNetV3Large => Self::MobileNetV3(MobileNetV3::large(builder)?),
            Arch::VitTinyPatch16 | Arch::VitSmallPatch16 | Arch::VitBasePatch16 => {
                Self::Vit(Vit::new(builder, arch.feature_width(), 16, vit)?)
            }
            Arch::VitTinyPatch8 | Arch::VitSmallPatch8 | Arch::VitBasePatch8 => {
                Self::Vit(Vit::new(builder, arch.feature_width(), 8, vit)?)
            }
            Arch::XcitTiny12Patch16 | Arch::XcitSmall12Patch16 => Self::Xcit(Xcit::new(builder, arch.feature_width())?),
        })
    }

    /// `(B, H, W, 3)` to `(B, F)`.
    fn forward<I: Interpreter>(&self, run: &mut I, xs: &I::Value) -> Result<I::Value> {
        match self {
            Self::ResNet(network) => network.forward(run, xs),
            Self::EfficientNet(network) => network.forward(run, xs),
            Self::MobileNetV3(network) => network.forward(run, xs),
            Self::Vit(network) => network.forward(run, xs),
            Self::Xcit(network) => network.forward(run, xs),
        }
    }
}

#[derive(Debug, Clone)]
struct Layers {
    backbone: Backbone,
    head: Option<ProjectionHead>,
}

impl Layers {
    fn new(builder: &mut Builder, arch: Arch, head: Option<HeadConfig>, vit: VitOptions) -> Result<Self> {
        let backbone = Backbone::new(builder, arch, vit)?;
        let head = head.map(|config| config.declare(builder, arch.feature_width())).transpose()?;
        Ok(Self { backbone, head })
    }

    fn head(&self) -> Result<&ProjectionHead> {
        self.head
            .as_ref()
            .ok_or_else(|| Error::invalid("the model has no projection head, so it has no embeddings", ""))
    }
}

/// What an encoder makes of a view.
#[derive(Debug)]
pub struct Outputs {
    /// `(B, F)`: pooled, before the head.
    pub features: Tensor,
    /// `(B, D)`: after the head.
    pub projections: Tensor,
    /// `(B, D)`: the projections at unit length.
    pub embeddings: Tensor,
}

/// A backbone and perhaps a projection head, with their parameters.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use shared::models::{Arch, Encoder, HeadConfig};
/// use shared::ops::Mode;
///
/// let encoder = Encoder::new(Arch::ResNet18, Some(HeadConfig::mlp(64, 16)), 7)?;
/// let xs = Tensor::zeros((2, 32, 32, 3), DType::F32, &Device::Cpu)?;
/// assert_eq!(encoder.features(&xs, Mode::Eval)?.dims(), [2, 512]);
/// assert_eq!(encoder.embeddings(&xs, Mode::Eval)?.dims(), [2, 16]);
/// # Ok::<(), shared::Error>(())
/// ```
#[derive(Debug)]
pub struct Encoder {
    arch: Arch,
    head: Option<HeadConfig>,
    vit: VitOptions,
    layers: Layers,
    /// The frozen head of another network, which takes what the own head gives.
    reused_head: Option<Arc<MlpHead>>,
    store: ParameterStore,
    engine: Engine,
    trainable: bool,
}

impl Encoder {
    /// An encoder on the CPU with freshly drawn parameters, a function of the seed.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn new(arch: Arch, head: Option<HeadConfig>, seed: u64) -> Result<Self> {
        Self::on_device(arch, head, seed, &Device::Cpu)
    }

    /// As [`Encoder::new`], on a device.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn on_device(arch: Arch, head: Option<HeadConfig>, seed: u64, device: &Device) -> Result<Self> {
        Self::with_vit_options(arch, head, VitOptions::default(), seed, device)
    }

    /// As [`Encoder::on_device`], with what the tensors of a vision transformer do not tell; other networks do without.
    ///
    /// # Errors
    /// `Error::Invalid` when the heads do not divide the channels.
    pub fn with_vit_options(
        arch: Arch,
        head: Option<HeadConfig>,
        vit: VitOptions,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let mut builder = Builder::new(device);
        let layers = Layers::new(&mut builder, arch, head, vit)?;
        let store = builder.finish(seed)?;
        let engine = Engine::for_device(device);
        Ok(Self { arch, head, vit, layers, reused_head: None, store, engine, trainable: true })
    }

    /// The same encoder with the frozen head of another network behind its own, which adapts the features to it.
    ///
    /// # Errors
    /// `Error::Invalid` when the encoder has no head, or one of another width than `head` takes.
    pub fn with_reused_head(self, head: Arc<MlpHead>) -> Result<Self> {
        let (given, wanted) = (self.head.map_or(0, |own| own.embedding_dim), head.config().inputs());
        if given != wanted {
            let message = format!("a reused head takes rows of width {wanted}, those before it have {given}");
            return Err(Error::invalid(message, ""));
        }
        Ok(Self { reused_head: Some(head), ..self })
    }

    /// The same encoder computed by another engine.
    #[must_use]
    pub fn with_engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }

    /// A copy with parameters of its own that never records gradients: the momentum encoder, or a frozen teacher.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn momentum_copy(&self) -> Result<Self> {
        let mut builder = Builder::new(self.device());
        let layers = Layers::new(&mut builder, self.arch, self.head, self.vit)?;
        let store = builder.finish_zeroed();
        store.copy_from(&self.store)?;
        let reused_head = self.reused_head.clone();
        Ok(Self { layers, reused_head, store, trainable: false, ..*self })
    }

    /// The architecture of the backbone.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// The head, if there is one.
    pub fn head(&self) -> Option<HeadConfig> {
        self.head
    }

    /// `D`: the width of an embedding, 0 without a head.
    pub fn embedding_dim(&self) -> usize {
        let own = self.head.map_or(0, |head| head.embedding_dim);
        self.reused_head.as_ref().map_or(own, |head| head.config().outputs())
    }

    /// The engine that computes.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Where the parameters are.
    pub fn device(&self) -> &Device {
        self.store.parameters().next().map_or(&Device::Cpu, |(_, parameter)| parameter.var().device())
    }

    /// The parameters and buffers.
    pub fn store(&self) -> &ParameterStore {
        &self.store
    }

    /// The names of the tensors that are not the head's: what an exported student holds.
    pub fn is_backbone_tensor(name: &str) -> bool {
        !HeadKind::NAMES.iter().any(|head| name.starts_with(head))
    }

    /// Pooled features, before the head.
    ///
    /// In [`Mode::Train`] the running statistics move and, unless this is a momentum copy, a backward pass can follow.
    ///
    /// # Shapes
    /// - `xs`: `(B, H, W, 3)` f32, normalised images
    /// - returns: `(B, F)` f32
    ///
    /// # Errors
    /// `Error::Shape` for another shape; `Error::Invalid` when the batch cannot be cut into the batch norm groups.
    pub fn features(&self, xs: &Tensor, mode: Mode) -> Result<Tensor> {
        self.layers.backbone.forward(&mut self.pass(mode), xs)
    }

    /// Everything that a training uses of a view: features, what the head makes of them, and embeddings.
    ///
    /// # Shapes
    /// - `xs`: `(B, H, W, 3)` f32, normalised images
    ///
    /// # Errors
    /// As [`Encoder::embeddings`].
    pub fn outputs(&self, xs: &Tensor, mode: Mode) -> Result<Outputs> {
        self.outputs_of(self.features(xs, mode)?, mode)
    }

    /// As [`Encoder::outputs`], from features that [`Encoder::features`] made in the same mode: of views of several sizes, say.
    ///
    /// # Shapes
    /// - `features`: `(B, F)` f32
    ///
    /// # Errors
    /// As [`Encoder::embeddings`].
    pub fn outputs_of(&self, features: Tensor, mode: Mode) -> Result<Outputs> {
        let pass = self.pass(mode);
        let projections = self.project(&features, &pass)?;
        let embeddings = ops::l2_normalise(&projections, &pass)?;
        Ok(Outputs { features, projections, embeddings })
    }

    /// Embeddings: the head applied to the features, rows of unit length.
    ///
    /// # Shapes
    /// - `xs`: `(B, H, W, 3)` f32, normalised images
    /// - returns: `(B, D)` f32, rows of unit length
    ///
    /// # Errors
    /// As [`Encoder::features`]; `Error::Invalid` when the encoder has no head.
    pub fn embeddings(&self, xs: &Tensor, mode: Mode) -> Result<Tensor> {
        ops::l2_normalise(&self.head_outputs(xs, mode)?, &self.pass(mode))
    }

    /// The head applied to the features: embeddings before they are scaled to unit length.
    ///
    /// # Shapes
    /// - `xs`: `(B, H, W, 3)` f32, normalised images
    /// - returns: `(B, D)` f32
    ///
    /// # Errors
    /// As [`Encoder::embeddings`].
    pub fn head_outputs(&self, xs: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut pass = self.pass(mode);
        let features = self.layers.backbone.forward(&mut pass, xs)?;
        self.project(&features, &pass)
    }

    /// Runs the backbone's definition by another interpreter, up to the pooled features.
    ///
    /// # Errors
    /// What the interpreter meets.
    pub fn interpret<I: Interpreter>(&self, run: &mut I, xs: &I::Value) -> Result<I::Value> {
        self.layers.backbone.forward(run, xs)
    }

    /// Runs the projection head's definition by another interpreter, from the features up to rows that are not of unit length yet.
    ///
    /// # Errors
    /// `Error::Invalid` when the encoder has no head or reuses another's; what the interpreter meets.
    pub fn interpret_head<I: Interpreter>(&self, run: &mut I, features: &I::Value) -> Result<I::Value> {
        if self.reused_head.is_some() {
            let hint = "leave the head out: the backbone is all that is used afterwards";
            return Err(Error::invalid("an encoder with the head of another network is no single graph", hint));
        }
        run.projection_head(features, self.layers.head()?)
    }

    fn project(&self, features: &Tensor, pass: &Pass) -> Result<Tensor> {
        let projections = ops::projection_head(features, self.layers.head()?, pass)?;
        self.reused_head.as_ref().map_or(Ok(projections.clone()), |head| head.forward(&projections))
    }

    fn pass(&self, mode: Mode) -> Pass {
        Pass { mode, record: self.trainable && mode != Mode::Eval, engine: self.engine }
    }
}
