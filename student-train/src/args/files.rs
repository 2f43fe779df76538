//! Arguments of the commands that turn weights into other files: `export` and `import`.

use std::path::PathBuf;

use clap::ValueEnum;
use shared::models::Arch;

/// Formats of an exported student.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// The backbone's weights, for timm and torchvision
    #[default]
    Safetensors,
    /// The same as a PyTorch file, for `torch.load` and Detectron2
    Pth,
    /// The backbone as a graph that computes features, for ONNX Runtime and others
    Onnx,
}

/// Which weights of a run are exported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ExportedWeights {
    /// The student that was evaluated: the moving average of a run with `--ema-decay`, otherwise the last weights
    #[default]
    Student,
    /// Those that the last step left
    Last,
}

/// Whose names the tensors of an exported student bear.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum TensorNames {
    /// Those of timm, for ResNet also torchvision's
    #[default]
    Timm,
    /// Those of Detectron2, for ResNet; with `--format pth`
    Detectron2,
}

/// Arguments of `export`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_long_help = EXPORT_EXAMPLES)]
pub struct ExportArgs {
    /// A finished run
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value_t)]
    pub format: ExportFormat,
    /// Where to write it
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Names of the tensors
    #[arg(long, value_enum, default_value_t, value_name = "WHOSE")]
    pub names: TensorNames,
    /// Weights of a run with `--ema-decay`: the average or the last
    #[arg(long, value_enum, default_value_t, value_name = "WHICH")]
    pub weights: ExportedWeights,
    /// Side of the images that an ONNX graph takes, in pixels [default: that of the run's views]
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u16).range(1..))]
    pub size: Option<u16>,
    /// Add the projection head to an ONNX graph, with `embeddings` as a second output
    #[arg(long)]
    pub head: bool,
    /// Replace the file if it exists
    #[arg(long)]
    pub overwrite: bool,
    /// Print a summary as JSON on standard output
    #[arg(long)]
    pub json: bool,
}

const EXPORT_EXAMPLES: &str = "\
Examples:
  student-train export runs/disco --output student.safetensors
      model = timm.create_model('resnet18', num_classes=0)
      model.load_state_dict(safetensors.torch.load_file('student.safetensors'))

  student-train export runs/disco --format pth --output student.pth
      model = timm.create_model('resnet18', num_classes=0)
      model.load_state_dict(torch.load('student.pth', weights_only=True))

  student-train export runs/disco --format pth --names detectron2 --output backbone.pth
      cfg.MODEL.WEIGHTS = 'backbone.pth'
      cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
      cfg.INPUT.FORMAT = 'RGB'
      cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]

  student-train export runs/disco --format onnx --size 224 --output student.onnx
      session = onnxruntime.InferenceSession('student.onnx')
      features = session.run(['features'], {'images': images})[0]
      # images: float32 (batch, 3, 224, 224), RGB in 0..1 minus mean, over std;
      # session.get_modelmeta().custom_metadata_map holds mean, std, arch, feature_width, image_size";

/// Arguments of `import`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Example: student-train import resnet18-f37072fd.pth --output resnet18.safetensors\n\n\
    The file has timm's names, f32 weights and batch-norm statistics. `student-train distill --init`, `student-eval` and\n\
    `teacher-embed` take it, and so does timm: `load_state_dict(load_file(FILE))`. The summary tells what was used,\n\
    what was left over (a classifier, a head) and what is missing; a backbone that is not complete is refused.")]
pub struct ImportArgs {
    /// A checkpoint: PyTorch's two formats or safetensors, with timm's or torchvision's names behind any prefix
    #[arg(value_name = "CKPT")]
    pub checkpoint: PathBuf,
    /// Where to write the file
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Architecture that the checkpoint must hold [default: recognised from names and shapes]
    #[arg(long, value_name = "ARCH")]
    pub student: Option<Arch>,
    /// Where the state dict is in the checkpoint: keys joined by dots [default: the usual keys, or where most tensors are]
    #[arg(long, value_name = "KEY")]
    pub state_key: Option<String>,
    /// Replace the file if it exists
    #[arg(long)]
    pub overwrite: bool,
    /// Print a summary as JSON on standard output
    #[arg(long)]
    pub json: bool,
}
