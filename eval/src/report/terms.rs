//! What the logged terms of a training are called in tables and pictures.

/// A logged quantity in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Term {
    /// Its key in `metrics.jsonl`.
    pub(super) key: String,
    /// Over its picture.
    pub(super) title: String,
    /// Over its column.
    pub(super) column: String,
    /// On its axis.
    pub(super) unit: &'static str,
}

/// Key, title, column, unit of the terms that every reader meets, in the order in which they are shown.
const KNOWN: [(&str, &str, &str, &str); 6] = [
    ("info_nce", "Contrastive loss", "contrastive loss", "InfoNCE"),
    ("swapped_prediction", "Swapped prediction of clusters", "swapped prediction", "cross entropy"),
    ("distill_q", "Distance to the teacher, query view", "distance, query", "squared distance"),
    ("distill_k", "Distance to the teacher, key view", "distance, key", "squared distance"),
    ("top1", "Queries closest to their own key", "query finds its key, %", "percent"),
    ("grad_norm", "Norm of the gradients before clipping", "gradient norm", "norm"),
];

/// The terms of some runs in words: those that are known first, then any others under their own names.
pub(super) fn terms<'a>(keys: impl IntoIterator<Item = &'a str>) -> Vec<Term> {
    let keys: std::collections::BTreeSet<&str> = keys.into_iter().filter(|key| *key != "loss").collect();
    let known = KNOWN.iter().filter(|(key, ..)| keys.contains(key)).map(|&(key, title, column, unit)| Term {
        key: key.into(),
        title: title.into(),
        column: column.into(),
        unit,
    });
    let others = keys.iter().filter(|key| KNOWN.iter().all(|(known, ..)| known != *key)).map(|key| Term {
        key: (*key).into(),
        title: key.replace('_', " "),
        column: key.replace('_', " "),
        unit: "mean",
    });
    known.chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_terms_come_first_and_others_keep_their_names() {
        let found = terms(["rkd_angle_q", "distill_q", "info_nce", "loss", "distill_q"]);
        let columns: Vec<&str> = found.iter().map(|term| term.column.as_str()).collect();
        assert_eq!(columns, ["contrastive loss", "distance, query", "rkd angle q"]);
        assert_eq!((found[2].key.as_str(), found[2].unit), ("rkd_angle_q", "mean"));
    }
}
