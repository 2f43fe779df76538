//! The ONNX files of every network: well-formed graphs over timm's tensors, in the messages of the specification.
//!
//! That runtimes compute the same features is checked by `tests/interop/exported_students.py`.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use shared::models::{Arch, Encoder, HeadConfig, HeadKind};
use shared::onnx::proto::{
    AttributeProto, AttributeType, DataType, Dimension, DimensionProto, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto, TypeProto,
    ValueInfoProto,
};
use shared::{Error, Result, onnx};

const HEAD: HeadConfig = HeadConfig::mlp(8, 4);
/// The others have more of the same blocks.
const ONE_OF_EACH_KIND: [Arch; 7] = [
    Arch::ResNet18,
    Arch::ResNet50,
    Arch::EfficientNetB0,
    Arch::EfficientNetLite0,
    Arch::MobileNetV3Large,
    Arch::VitTinyPatch16,
    Arch::XcitTiny12Patch16,
];

fn encoded(arch: Arch, head: Option<HeadConfig>, size: [usize; 2]) -> Result<(Encoder, ModelProto)> {
    let encoder = Encoder::new(arch, head, 3)?;
    let bytes = onnx::encode(&encoder, size, &BTreeMap::new(), "")?;
    let model = ModelProto::decode(bytes.as_slice()).map_err(|e| Error::invalid(e.to_string(), ""))?;
    Ok((encoder, model))
}

fn text(name: Option<&String>) -> &str {
    name.map_or("", String::as_str)
}

fn nodes<'a>(graph: &'a GraphProto, op: &str) -> Vec<&'a NodeProto> {
    graph.node.iter().filter(|node| text(node.op_type.as_ref()) == op).collect()
}

fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|attribute| text(attribute.name.as_ref()) == name)
}

/// The sizes of an input or output, -1 for the batch.
fn sizes(value: &ValueInfoProto) -> Vec<i64> {
    let shape = value.r#type.as_ref().and_then(|kind| kind.tensor_type.as_ref()?.shape.as_ref());
    let size = |dim: &DimensionProto| match &dim.value {
        Some(Dimension::DimValue(size)) => *size,
        Some(Dimension::DimParam(name)) if name == "batch" => -1,
        _ => -2,
    };
    shape.map(|shape| shape.dim.iter().map(size).collect()).unwrap_or_default()
}

#[test]
fn messages_are_those_of_the_onnx_package() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/golden/onnx_message.json")).unwrap();
    let some = |text: &str| Some(text.to_string());
    let attribute = |name: &str, kind: AttributeType| AttributeProto {
        name: some(name),
        r#type: Some(kind.into()),
        ..AttributeProto::default()
    };
    let tensor = |name: &str, dims: Vec<i64>, kind: DataType, raw_data: Vec<u8>| TensorProto {
        dims,
        data_type: Some(kind.into()),
        name: some(name),
        raw_data: Some(raw_data),
    };
    let value_info = |name: &str, sizes: &[i64]| {
        let batch = Dimension::DimParam("batch".into());
        let dims = std::iter::once(batch).chain(sizes.iter().copied().map(Dimension::DimValue));
        let dim = dims.map(|value| DimensionProto { value: Some(value) }).collect();
        let shape = Some(TensorShapeProto { dim });
        let tensor_type = Some(TensorTypeProto { elem_type: Some(DataType::Float.into()), shape });
        ValueInfoProto { name: some(name), r#type: Some(TypeProto { tensor_type }) }
    };
    let entry = |key: &str, value: &str| StringStringEntryProto { key: some(key), value: some(value) };
    let weight = [1.5f32, -2.0, 0.25, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let index = [-1i64, 300].iter().flat_map(|x| x.to_le_bytes()).collect();
    let node = NodeProto {
        input: vec!["images".into(), "weight".into()],
        output: vec!["features".into()],
        name: some("conv"),
        op_type: some("Conv"),
        attribute: vec![
            AttributeProto { i: Some(0), ..attribute("group", AttributeType::Int) },
            AttributeProto { f: Some(0.5), ..attribute("alpha", AttributeType::Float) },
            AttributeProto { ints: vec![0, 1, 200], ..attribute("pads", AttributeType::Ints) },
        ],
    };
    let graph = GraphProto {
        node: vec![node],
        name: some("resnet18"),
        initializer: vec![
            tensor("weight", vec![2, 2], DataType::Float, weight),
            tensor("index", vec![2], DataType::Int64, index),
        ],
        input: vec![value_info("images", &[3, 224])],
        output: vec![value_info("features", &[512])],
    };
    let model = ModelProto {
        ir_version: Some(8),
        producer_name: some("producer"),
        producer_version: some("0.1"),
        doc_string: some("text"),
        graph: Some(graph),
        opset_import: vec![OperatorSetIdProto { domain: some(""), version: Some(17) }],
        metadata_props: vec![entry("arch", "resnet18"), entry("mean", "[0.485]")],
    };
    assert_eq!(golden["bytes"], serde_json::json!(model.encode_to_vec()));
}

#[test]
fn graphs_are_in_order_and_hold_all_tensors_of_the_network() -> Result<()> {
    let other_heads =
        [HeadKind::Linear, HeadKind::MlpBatchNorm].map(|kind| (Arch::ResNet18, HeadConfig { kind, ..HEAD }));
    for (arch, head) in ONE_OF_EACH_KIND.map(|arch| (arch, HEAD)).into_iter().chain(other_heads) {
        let (encoder, model) = encoded(arch, Some(head), [224, 224])?;
        let graph = model.graph.unwrap();
        let tensors = encoder.store().to_tensors()?;
        let mut known = BTreeSet::from([onnx::IMAGES.to_string()]);
        let mut named = 0;
        for initializer in &graph.initializer {
            let name = text(initializer.name.as_ref());
            assert!(known.insert(name.into()), "{arch}: `{name}` is given twice");
            let bytes = initializer.raw_data.as_ref().unwrap();
            if let Some(tensor) = tensors.get(name) {
                named += 1;
                let dims: Vec<usize> = initializer.dims.iter().map(|size| *size as usize).collect();
                assert_eq!(dims, tensor.dims(), "{arch}: {name}");
                let values: Vec<f32> = bytemuck::pod_collect_to_vec(bytes);
                assert!(values == tensor.flatten_all()?.to_vec1::<f32>()?, "{arch}: {name}");
            } else {
                // Numbers, lists of sizes, and the waves of positions.
                let plain = initializer.dims.len() <= 1 && bytes.len() <= 48;
                assert!(plain || name == "pos_embed.token_projection.waves", "{arch}: `{name}` is not the network's");
            }
        }
        let counters = tensors.keys().filter(|name| name.ends_with("num_batches_tracked")).count();
        assert_eq!(named, tensors.len() - counters, "{arch}");

        let mut used = BTreeSet::new();
        for node in &graph.node {
            for input in &node.input {
                assert!(known.contains(input), "{arch}: `{input}` is used before it is computed");
                used.insert(input.clone());
            }
            assert_eq!(node.output.len(), 1);
            assert!(known.insert(node.output[0].clone()), "{arch}: `{}` has two sources", node.output[0]);
        }
        let outputs: Vec<&str> = graph.output.iter().map(|output| text(output.name.as_ref())).collect();
        assert_eq!(outputs, [onnx::FEATURES, onnx::EMBEDDINGS]);
        used.insert(onnx::EMBEDDINGS.into());
        assert!(known == used, "{arch}: unused {:?}", known.difference(&used));
        assert_eq!(sizes(&graph.input[0]), [-1, 3, 224, 224]);
        assert_eq!(sizes(&graph.output[0]), [-1, arch.feature_width() as i64]);
        assert_eq!(sizes(&graph.output[1]), [-1, 4]);
    }
    Ok(())
}

#[test]
fn without_a_head_features_are_the_only_output() -> Result<()> {
    let (_, model) = encoded(Arch::ResNet18, None, [64, 48])?;
    let graph = model.graph.unwrap();
    assert_eq!(graph.output.len(), 1);
    assert_eq!(sizes(&graph.input[0]), [-1, 3, 64, 48]);
    assert_eq!(graph.node.last().map(|node| node.output[0].as_str()), Some(onnx::FEATURES));
    assert!(nodes(&graph, "Gemm").is_empty());
    Ok(())
}

#[test]
fn tensorflows_padding_is_that_of_the_size() -> Result<()> {
    let stem = |size| -> Result<Vec<i64>> {
        let (_, model) = encoded(Arch::EfficientNetLite0, None, size)?;
        Ok(attribute(nodes(&model.graph.unwrap(), "Conv")[0], "pads").unwrap().ints.clone())
    };
    // A stride of 2 over an even side leaves the first row without a zero before it.
    assert_eq!(stem([224, 224])?, [0, 0, 1, 1]);
    assert_eq!(stem([75, 75])?, [1, 1, 1, 1]);
    assert_eq!(stem([224, 75])?, [0, 1, 1, 1]);
    Ok(())
}

#[test]
fn learned_positions_are_resampled_to_the_size() -> Result<()> {
    for (size, dims) in [([224, 224], [1, 1 + 14 * 14, 192]), ([96, 64], [1, 1 + 6 * 4, 192])] {
        let (_, model) = encoded(Arch::VitTinyPatch16, None, size)?;
        let graph = model.graph.unwrap();
        let positions = graph.initializer.iter().find(|constant| text(constant.name.as_ref()) == "pos_embed").unwrap();
        assert_eq!(positions.dims, dims);
    }
    Ok(())
}

#[test]
fn settings_of_operators_follow_the_network() -> Result<()> {
    let (_, model) = encoded(Arch::EfficientNetLite0, None, [64, 64])?;
    let graph = model.graph.unwrap();
    assert_eq!(model.opset_import[0].version, Some(17));
    for norm in nodes(&graph, "BatchNormalization") {
        assert_eq!(attribute(norm, "epsilon").unwrap().f, Some(1e-3));
    }
    let depthwise =
        nodes(&graph, "Conv").into_iter().find(|node| text(node.name.as_ref()) == "blocks.1.0.conv_dw").unwrap();
    assert_eq!(attribute(depthwise, "group").unwrap().i, Some(96));
    assert_eq!(attribute(depthwise, "strides").unwrap().ints, [2, 2]);
    assert_eq!(attribute(depthwise, "kernel_shape").unwrap().ints, [3, 3]);

    let (_, model) = encoded(Arch::MobileNetV3Large, None, [64, 64])?;
    let graph = model.graph.unwrap();
    for norm in nodes(&graph, "BatchNormalization") {
        assert_eq!(attribute(norm, "epsilon").unwrap().f, Some(1e-5));
    }
    let gates = nodes(&graph, "HardSigmoid");
    assert_eq!(gates.len(), 8);
    assert_eq!(attribute(gates[0], "alpha").unwrap().f, Some(1.0 / 6.0));
    assert!(nodes(&graph, "HardSwish").len() > 10);
    Ok(())
}

#[test]
fn the_same_encoder_gives_the_same_bytes() -> Result<()> {
    let encoder = Encoder::new(Arch::MobileNetV3Large, Some(HEAD), 1)?;
    let metadata = BTreeMap::from([("arch".to_string(), "mobilenetv3_large_100".to_string())]);
    let bytes = onnx::encode(&encoder, [96, 96], &metadata, "text")?;
    assert!(bytes == onnx::encode(&encoder, [96, 96], &metadata, "text")?);
    let model = ModelProto::decode(bytes.as_slice()).unwrap();
    assert_eq!(text(model.doc_string.as_ref()), "text");
    assert_eq!(text(model.metadata_props[0].key.as_ref()), "arch");
    Ok(())
}

#[test]
fn images_without_pixels_are_refused() -> Result<()> {
    let encoder = Encoder::new(Arch::ResNet18, None, 1)?;
    let error = onnx::encode(&encoder, [0, 5], &BTreeMap::new(), "").unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    Ok(())
}
