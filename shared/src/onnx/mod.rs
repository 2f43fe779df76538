//! Writes networks as ONNX files: graphs of standard operators with their weights, which run without this program or `PyTorch`.
//!
//! The input is `images`, `(B, 3, H, W)` f32: RGB, normalised, the batch of any size, height and width fixed. The first output is
//! `features`, `(B, F)`. An encoder with a projection head has a second one, `embeddings`, `(B, D)`, rows of unit length.
//! Constants bear the names of timm's tensors; the learned positions of a vision transformer are those of the graph's size. Batch norms
//! stay operators of their own; runtimes join them with the convolutions.
//!
//! Source: the ONNX specification, <https://onnx.ai/onnx/repo-docs/IR.html>, operator set 17.

mod builder;
mod interpreter;
pub mod proto;
mod tokens;

use std::collections::BTreeMap;

use prost::Message as _;

use self::builder::{Edge, GraphBuilder, Layout};
use self::proto::{
    DataType, Dimension, DimensionProto, GraphProto, ModelProto, OperatorSetIdProto, StringStringEntryProto,
    TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};
use crate::Result;
use crate::models::Encoder;
use crate::ops::Shape;

/// Version of the file format.
const IR_VERSION: i64 = 8;
/// Version of the operators, the first with layer normalisation.
const OPERATOR_SET: i64 = 17;

/// The name of the input.
pub const IMAGES: &str = "images";
/// The name of the first output.
pub const FEATURES: &str = "features";
/// The name of the second output.
pub const EMBEDDINGS: &str = "embeddings";

/// An encoder in evaluation mode as the bytes of an ONNX file, for images of `[H, W]` pixels. The same encoder gives the same bytes.
///
/// `metadata` are text entries for programs, `description` is text for people.
///
/// # Errors
/// [`crate::Error::Shape`] for images that the network does not take.
pub fn encode(
    encoder: &Encoder,
    [height, width]: [usize; 2],
    metadata: &BTreeMap<String, String>,
    description: &str,
) -> Result<Vec<u8>> {
    let tensors = encoder.store().to_tensors()?;
    let mut graph = GraphBuilder::new(&tensors);
    let shape = Shape::Image { channels: 3, height, width };
    let images = Edge { name: IMAGES.into(), shape, layout: Layout::ChannelsFirst };
    let pooled = encoder.interpret(&mut graph, &images)?;
    let mut outputs = vec![graph.output(&pooled, FEATURES)];
    if encoder.head().is_some() {
        let projected = encoder.interpret_head(&mut graph, &outputs[0])?;
        let name = graph.l2_normalise(&projected.name, EMBEDDINGS);
        outputs.push(Edge { name, ..projected });
    }
    let model = ModelProto {
        ir_version: Some(IR_VERSION),
        producer_name: Some("student-train".into()),
        producer_version: Some(env!("CARGO_PKG_VERSION").into()),
        doc_string: Some(description.into()),
        graph: Some(GraphProto {
            node: graph.nodes,
            name: Some(encoder.arch().name().into()),
            initializer: graph.initializers,
            input: vec![value_info(&images)],
            output: outputs.iter().map(value_info).collect(),
        }),
        opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(OPERATOR_SET) }],
        metadata_props: metadata
            .iter()
            .map(|(key, value)| StringStringEntryProto { key: Some(key.clone()), value: Some(value.clone()) })
            .collect(),
    };
    Ok(model.encode_to_vec())
}

fn value_info(edge: &Edge) -> ValueInfoProto {
    let sizes = match edge.shape {
        Shape::Image { channels, height, width } => vec![channels, height, width],
        Shape::Tokens { count, channels } => vec![count, channels],
        Shape::Row { channels } => vec![channels],
    };
    let sizes = sizes.into_iter().map(|size| Dimension::DimValue(size as i64));
    let dim = std::iter::once(Dimension::DimParam("batch".into()))
        .chain(sizes)
        .map(|value| DimensionProto { value: Some(value) })
        .collect();
    let tensor_type =
        TensorTypeProto { elem_type: Some(DataType::Float.into()), shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto { name: Some(edge.name.clone()), r#type: Some(TypeProto { tensor_type: Some(tensor_type) }) }
}
