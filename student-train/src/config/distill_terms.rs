//! The terms that a teacher adds to the loss, as they are written: `mse=32,rkd=1@query`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A term, in the order in which terms are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DistillTerm {
    /// Squared distance of the embeddings (`DisCo`).
    Mse,
    /// Distances between samples.
    RkdDistance,
    /// Angles between samples.
    RkdAngle,
    /// Similarity to a queue of the teacher's embeddings.
    Seed,
    /// Regression of the embeddings from the student's features.
    SimReg,
}

/// Views of a sample on which a term acts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DistillViews {
    /// The query's and the key's
    #[default]
    Both,
    /// The query's alone
    Query,
}

/// What was asked of a term.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AskedTerm {
    /// Its factor in the loss, per view.
    pub weight: f64,
    /// Where it acts; none follows `--distill-views`.
    pub views: Option<DistillViews>,
}

/// Terms with their weights, at least one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DistillTerms(pub BTreeMap<DistillTerm, AskedTerm>);

/// Every way to name terms.
const NAMES: &str = "mse, rkd, rkd-distance, rkd-angle, seed, simreg";

impl DistillTerm {
    const ALL: [Self; 5] = [Self::Mse, Self::RkdDistance, Self::RkdAngle, Self::Seed, Self::SimReg];

    /// Its name in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mse => "mse",
            Self::RkdDistance => "rkd-distance",
            Self::RkdAngle => "rkd-angle",
            Self::Seed => "seed",
            Self::SimReg => "simreg",
        }
    }

    /// The terms that a name stands for, and their shares of its weight.
    fn named(name: &str) -> Option<Vec<(Self, f64)>> {
        if name == "rkd" {
            return Some(vec![(Self::RkdDistance, 1.0), (Self::RkdAngle, 1.0)]);
        }
        Self::ALL.into_iter().find(|term| term.name() == name).map(|term| vec![(term, 1.0)])
    }
}

impl DistillTerms {
    /// Adds what one name asks for, `value` is `WEIGHT` or `WEIGHT@VIEWS`.
    fn add(&mut self, name: &str, value: &str) -> Result<(), String> {
        let (weight, views) = match value.split_once('@') {
            None => (value, None),
            Some((weight, views)) => {
                let known = DistillViews::from_str(views, false);
                (weight, Some(known.map_err(|_unknown| format!("`{views}` is not `both` or `query`"))?))
            }
        };
        let weight: f64 = weight.trim().parse().map_err(|_wrong| format!("`{weight}` is no weight of `{name}`"))?;
        if !weight.is_finite() || weight < 0.0 {
            return Err(format!("the weight of `{name}` must be at least 0, got {weight}"));
        }
        let terms = DistillTerm::named(name).ok_or_else(|| format!("`{name}` is no term, expected one of {NAMES}"))?;
        for (term, share) in terms {
            if self.0.insert(term, AskedTerm { weight: weight * share, views }).is_some() {
                return Err(format!("`{}` is given twice", term.name()));
            }
        }
        Ok(())
    }
}

impl FromStr for DistillTerms {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut terms = Self::default();
        for part in text.split(',') {
            let (name, value) = part.split_once('=').ok_or_else(|| {
                format!("`{part}` is not TERM=WEIGHT, with a TERM of {NAMES}, as in `mse=32,rkd=1@query`")
            })?;
            terms.add(name.trim(), value.trim())?;
        }
        Ok(terms)
    }
}

impl fmt::Display for DistillTerms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (term, AskedTerm { weight, views })) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}={weight}", term.name())?;
            match views {
                None => {}
                Some(DistillViews::Both) => write!(f, "@both")?,
                Some(DistillViews::Query) => write!(f, "@query")?,
            }
        }
        Ok(())
    }
}

impl Serialize for DistillTerms {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A weight in a table: a number, or text with views.
#[derive(Deserialize)]
#[serde(untagged)]
enum TableWeight {
    Number(f64),
    Text(String),
}

impl<'de> Deserialize<'de> for DistillTerms {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Terms;
        impl<'de> Visitor<'de> for Terms {
            type Value = DistillTerms;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "text like `mse=32,rkd=1@query`, or a table of terms and weights")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<DistillTerms, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DistillTerms, A::Error> {
                let mut terms = DistillTerms::default();
                while let Some((name, weight)) = map.next_entry::<String, TableWeight>()? {
                    let value = match weight {
                        TableWeight::Number(weight) => weight.to_string(),
                        TableWeight::Text(text) => text,
                    };
                    terms.add(&name, &value).map_err(de::Error::custom)?;
                }
                Ok(terms)
            }
        }
        deserializer.deserialize_any(Terms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(text: &str) -> DistillTerms {
        text.parse().unwrap()
    }

    #[test]
    fn text_and_table_say_the_same() {
        #[derive(Deserialize)]
        struct File {
            distill: DistillTerms,
        }
        let expected = terms("mse=32,rkd=1.5@query");
        assert_eq!(expected.0[&DistillTerm::RkdAngle], AskedTerm { weight: 1.5, views: Some(DistillViews::Query) });
        assert_eq!(expected.0[&DistillTerm::Mse], AskedTerm { weight: 32.0, views: None });
        for file in ["distill = \"rkd=1.5@query, mse=32\"", "[distill]\nmse = 32\nrkd = \"1.5@query\""] {
            assert_eq!(toml::from_str::<File>(file).unwrap().distill, expected, "{file}");
        }
        assert_eq!(expected.to_string(), "mse=32,rkd-distance=1.5@query,rkd-angle=1.5@query");
        assert_eq!(terms(&expected.to_string()), expected);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (text, words) in [
            ("mse", "`mse` is not TERM=WEIGHT"),
            ("kd=1", "`kd` is no term"),
            ("mse=x", "`x` is no weight of `mse`"),
            ("mse=-1", "at least 0"),
            ("mse=inf", "at least 0"),
            ("mse=1,mse=2", "`mse` is given twice"),
            ("rkd=1,rkd-angle=2", "`rkd-angle` is given twice"),
            ("mse=1@key", "`key` is not `both` or `query`"),
        ] {
            let message = text.parse::<DistillTerms>().unwrap_err();
            assert!(message.contains(words), "{text}: {message}");
        }
    }
}
