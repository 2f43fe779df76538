//! What recognition says of files that are odd: the layouts of real methods are tested against PyTorch's names.

use super::*;
use crate::models::MlpLayer;

type Entries = Vec<(String, Vec<usize>)>;
type Tensors = [(&'static str, &'static [usize])];

fn network(arch: Arch, prefix: &str) -> Entries {
    let entries = names_and_shapes(arch, None).unwrap();
    entries.into_iter().map(|(name, shape)| (format!("{prefix}{name}"), shape)).collect()
}

fn with(mut entries: Entries, more: &Tensors) -> Entries {
    entries.extend(more.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())));
    entries
}

/// The head of `MoCo` v2 under a prefix.
fn projection(mut entries: Entries, prefix: &str, features: usize) -> Entries {
    for (name, shape) in
        [("0.weight", vec![64, features]), ("0.bias", vec![64]), ("2.weight", vec![16, 64]), ("2.bias", vec![16])]
    {
        entries.push((format!("{prefix}{name}"), shape));
    }
    entries
}

fn first(entries: &Entries) -> Recognised {
    recognise(entries).unwrap().remove(0)
}

#[test]
fn every_architecture_is_told_apart_under_every_prefix() {
    let prefixes = [
        "",
        "module.",
        "module.encoder_q.",
        "backbone.",
        "module.base_encoder.",
        "net.inner.",
        "teacher.",
        "student.backbone.",
        "online_network.encoder.",
        "online_encoder.net.",
        "encoder.",
        "trunk._feature_blocks.",
        "model.",
        "module.model.encoder.backbone.",
        "query.",
    ];
    for arch in Arch::ALL {
        for prefix in prefixes {
            let found =
                recognise(&projection(network(arch, prefix), &format!("{prefix}fc."), arch.feature_width())).unwrap();
            assert_eq!(found.len(), 1);
            assert_eq!((found[0].arch, found[0].prefix.as_str(), found[0].embedding_dim()), (arch, prefix, 16));
            assert!(found[0].is_complete() && found[0].unexpected.is_empty() && found[0].left_over.is_empty());
        }
    }
}

#[test]
fn a_copy_that_is_only_needed_to_go_on_training_is_never_preferred() {
    let pairs = [
        ("module.encoder_q.", "module.encoder_k."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("online_encoder.net.", "target_encoder.net."),
        ("teacher.backbone.", "student.backbone."),
        ("query.", "key."),
        ("backbone.", "backbone_momentum."),
        ("backbone.", "momentum_backbone."),
    ];
    for (wanted, copy) in pairs {
        let mut entries = network(Arch::ResNet18, copy);
        entries.extend(network(Arch::ResNet18, wanted));
        let found = recognise(&entries).unwrap();
        assert_eq!([&found[0].prefix, &found[1].prefix], [wanted, copy]);
        assert_eq!(found[0].left_over.iter().map(|left| left.tensors).sum::<usize>(), entries.len() / 2, "{wanted}");
        assert!(found.iter().all(|found| found.is_complete() && found.unexpected.is_empty()), "{wanted}");
    }
}

#[test]
fn linear_heads_of_moco_and_of_classifiers_are_told_apart() {
    let linear: [(&str, &[usize]); 2] = [("fc.weight", &[10, 512]), ("fc.bias", &[10])];
    let classifier = with(network(Arch::ResNet34, ""), &linear);
    let found = first(&classifier);
    assert_eq!((found.method, found.embedding_dim(), found.head), (Method::Supervised, 512, None));
    let moco = first(&with(classifier.clone(), &[("queue", &[10, 32])]));
    assert_eq!((moco.method, moco.embedding_dim()), (Method::MocoV1, 10));
    let asked = fit(&classifier, Arch::ResNet34, Some(Method::MocoV1)).unwrap();
    assert_eq!((asked.embedding_dim(), asked.is_complete()), (10, true));
    // The scores of a classifier are no embedding of a method that has a projection head.
    let asked = fit(&classifier, Arch::ResNet34, Some(Method::MocoV2)).unwrap();
    assert_eq!(asked.missing, ["fc.0.weight"]);
}

#[test]
fn the_classifier_of_timms_efficient_networks_is_told() {
    for arch in [Arch::EfficientNetB0, Arch::MobileNetV3Large] {
        let classifier: [(&str, &[usize]); 2] = [("classifier.weight", &[1000, 1280]), ("classifier.bias", &[1000])];
        let found = first(&with(network(arch, ""), &classifier));
        assert_eq!((found.arch, found.method, found.embedding_dim()), (arch, Method::Supervised, 1280));
        assert!(found.is_complete() && found.unexpected.is_empty() && !found.has_further_layers());
        assert_eq!(found.left_over, [LeftOver { what: "head that the embedding does not use", tensors: 2 }]);
    }
}

#[test]
fn a_deeper_network_is_not_taken_for_the_smaller_one_in_it() {
    let found =
        first(&with(network(Arch::EfficientNetB0, "model."), &[("model.blocks.0.1.conv_dw.weight", &[16, 1, 3, 3])]));
    assert_eq!((found.arch, found.is_complete(), found.has_further_layers()), (Arch::EfficientNetB0, true, true));
}

#[test]
fn a_deeper_network_with_numbered_layers_is_not_taken_for_the_smaller_one_in_it() {
    let numbers =
        [("conv1.", "0."), ("bn1.", "1."), ("layer1.", "4."), ("layer2.", "5."), ("layer3.", "6."), ("layer4.", "7.")];
    let mut entries = network(Arch::ResNet34, "");
    for (name, _) in &mut entries {
        let renamed = numbers.iter().find_map(|(layer, number)| Some(format!("{number}{}", name.strip_prefix(layer)?)));
        *name = renamed.unwrap();
    }
    assert_eq!(first(&entries).arch, Arch::ResNet34);
    let smaller = fit(&entries, Arch::ResNet18, None).unwrap();
    assert!(smaller.is_complete() && smaller.has_further_layers());
}

#[test]
fn batch_counts_may_be_absent() {
    let mut entries = projection(network(Arch::ResNet18, ""), "fc.", 512);
    entries.retain(|(name, _)| !is_batch_count(name));
    assert!(first(&entries).is_complete());
}

#[test]
fn another_architecture_lists_what_is_missing_and_unexpected() {
    let moco = |arch| {
        let mut entries = projection(network(arch, "module.encoder_q."), "module.encoder_q.fc.", 512);
        entries.extend(network(arch, "module.encoder_k."));
        entries
    };
    let fitted = fit(&moco(Arch::ResNet18), Arch::ResNet34, None).unwrap();
    assert!(!fitted.is_complete());
    assert!(fitted.missing.contains(&"layer4.2.conv1.weight".to_owned()));
    assert!(fitted.unexpected.is_empty());
    let fitted = fit(&moco(Arch::ResNet34), Arch::ResNet18, Some(Method::MocoV2)).unwrap();
    assert!(fitted.unexpected.contains(&"module.encoder_q.layer4.2.conv1.weight".to_owned()));
}

#[test]
fn a_method_without_its_head_is_incomplete_and_dino_without_one_is_not() {
    let bare = network(Arch::ResNet50, "");
    for method in Method::ALL {
        let fitted = fit(&bare, Arch::ResNet50, Some(method)).unwrap();
        let expected = match method {
            Method::Dino | Method::Supervised | Method::Backbone => vec![],
            other => vec![other.usual_head().to_owned()],
        };
        assert_eq!((fitted.missing, fitted.unexpected), (expected, vec![]), "{method}");
    }
}

#[test]
fn what_tensors_do_not_tell_of_a_transformer_is_told_by_names_or_by_the_method() {
    let arch = Arch::VitSmallPatch16;
    let options = |entries: &Entries, method| fit(entries, arch, method).unwrap().vit_options();
    let stripped = network(arch, "");
    assert_eq!(options(&stripped, None), VitOptions::default());
    assert_eq!(options(&stripped, Some(Method::MocoV3)).heads, Some(12));
    assert_eq!(options(&stripped, Some(Method::Dino)).positions, PositionResampling::Dino);
    assert!(fit(&stripped, arch, Some(Method::MocoV3)).unwrap().is_complete());
    // Without a head, the words of the names still tell.
    let found = first(&network(arch, "module.base_encoder."));
    assert_eq!((found.method, found.vit_options().heads), (Method::Backbone, Some(12)));
    let base = first(&network(Arch::VitBasePatch16, "module.base_encoder."));
    assert_eq!(base.vit_options().heads, None);
}

#[test]
fn class_attention_of_the_official_xcit_is_three_tensors_only_where_its_rows_can_be_parted() {
    let place = Place { prefix: "b.".into(), naming: prefixes::Naming::Usual };
    let name = "b.cls_attn_blocks.1.attn.qkv.weight";
    let parted = |rows| place.tensors(&Names::new(&[(name.to_owned(), vec![rows, 4])]));
    let found = parted(12);
    for (index, part) in ["q", "k", "v"].into_iter().enumerate() {
        let source = Source { name: name.into(), shape: vec![4, 4], first_row: Some(4 * index) };
        assert_eq!(found[&format!("cls_attn_blocks.1.attn.{part}.weight")], source);
    }
    assert!(parted(13).contains_key("cls_attn_blocks.1.attn.qkv.weight"));
}

#[test]
fn a_missing_or_misshapen_tensor_is_named() {
    let mut entries = network(Arch::ResNet18, "module.");
    let conv = entries.iter_mut().find(|(name, _)| name == "module.layer1.0.conv1.weight").unwrap();
    conv.1 = vec![64, 64, 5, 5];
    entries.retain(|(name, _)| name != "module.bn1.bias");
    let found = first(&entries);
    assert_eq!(found.arch, Arch::ResNet18);
    assert_eq!(found.missing, ["bn1.bias"]);
    assert_eq!(found.mismatched, ["layer1.0.conv1.weight: [64, 64, 3, 3] expected, [64, 64, 5, 5] found"]);
}

#[test]
fn a_head_for_other_features_does_not_fit() {
    let found = first(&projection(network(Arch::ResNet18, "backbone."), "projector.", 2048));
    assert_eq!(found.mismatched, ["projector.: a head of 512 features expected, of 2048 found"]);
}

#[test]
fn heads_that_cannot_be_read_are_no_obstacle_to_the_backbone_but_to_the_method() {
    let broken: [(&str, &Tensors); 6] = [
        ("nothing tells what comes before `head.mlp.1`", &[("head.mlp.1.weight", &[8, 512])]),
        (
            "nothing tells what comes before `projector.3`",
            &[("projector.0.weight", &[8, 512]), ("projector.3.weight", &[8, 8])],
        ),
        (
            "takes rows of width 9, the layer before it gives 8",
            &[("projector.0.weight", &[8, 512]), ("projector.2.weight", &[4, 9])],
        ),
        (
            "`projector.1` is no whole batch norm",
            &[("projector.0.weight", &[8, 512]), ("projector.1.running_mean", &[8])],
        ),
        ("`projector.0` is neither a linear layer nor", &[("projector.0.weight", &[8, 512, 1])]),
        ("`projector.a.weight` is not a layer with a number", &[("projector.a.weight", &[8, 512])]),
    ];
    for (reason, tensors) in broken {
        let entries = with(network(Arch::ResNet18, "backbone."), tensors);
        let found = first(&entries);
        assert_eq!(
            (found.method, found.is_complete(), found.unexpected.len()),
            (Method::Backbone, true, 0),
            "{reason}"
        );
        let asked = fit(&entries, Arch::ResNet18, Some(Method::SimClr)).unwrap();
        assert!(asked.missing.iter().any(|missing| missing.contains(reason)), "{reason}: {:?}", asked.missing);
    }
}

#[test]
fn layers_of_a_head_are_read_in_the_order_of_their_numbers() {
    let mut tensors =
        vec![("projector.10.weight".to_owned(), vec![3, 8]), ("projector.0.weight".to_owned(), vec![8, 512])];
    for number in [2, 4, 6, 8] {
        tensors.push((format!("projector.{number}.weight"), vec![8, 8]));
    }
    let mut entries = network(Arch::ResNet18, "backbone.");
    entries.extend(tensors);
    let head = first(&entries).head.unwrap();
    assert_eq!((head.layers().len(), head.outputs()), (11, 3));
    assert!(head.layers().iter().skip(1).step_by(2).all(|layer| *layer == MlpLayer::Relu));
}

#[test]
fn tensors_that_nothing_accounts_for_are_unexpected() {
    let entries = with(network(Arch::ResNet18, "module."), &[("module.extra", &[3]), ("beside.weight", &[3, 3])]);
    assert_eq!(first(&entries).unexpected, ["beside.weight", "module.extra"]);
}

#[test]
fn other_networks_are_not_recognised() {
    let entries = vec![("embedding.weight".to_owned(), vec![192, 3, 16, 16]), ("cls".to_owned(), vec![1])];
    assert!(recognise(&entries).unwrap().is_empty());
    let fitted = fit(&entries, Arch::ResNet18, None).unwrap();
    assert_eq!(fitted.matched, 0);
    assert_eq!(fitted.unexpected.len(), 2);
}
