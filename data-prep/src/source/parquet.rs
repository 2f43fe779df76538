//! Parquet files as Hugging Face's `datasets` writes them: an image column of bytes and path, a column of labels.
//!
//! # Source
//! <https://huggingface.co/docs/datasets/image_dataset>; the features of a data set, class names among them, are JSON under the key
//! `huggingface` of the file's metadata.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Type;
use parquet::column::reader::{ColumnReaderImpl, get_typed_column_reader};
use parquet::data_type::{ByteArrayType, DataType, Int32Type, Int64Type};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::schema::types::ColumnDescriptor;
use serde_json::Value;
use shared::{Error, Fault, Result};

use super::builder::{Builder, check_label};
use super::parquet_rows::{Pages, column_reader};
use super::webdataset::files_of_split;
use super::{Archive, Place, Split};

/// Names of columns that hold images, the likeliest first.
const IMAGE_COLUMNS: [&str; 4] = ["image", "img", "jpg", "png"];
/// Names of columns that hold labels, the likeliest first.
const LABEL_COLUMNS: [&str; 5] = ["label", "labels", "fine_label", "cls", "class"];
/// How many values are read at a time.
const BATCH: usize = 4096;

/// A Parquet file and where its images are.
#[derive(Debug, Clone)]
pub(super) struct ParquetFile {
    pub(super) path: PathBuf,
    pub(super) metadata: Arc<ParquetMetaData>,
    /// Index of the column of encoded images.
    pub(super) image: usize,
    /// First row of each row group, and the number of all rows.
    pub(super) starts: Vec<u32>,
}

/// Lists the rows of a file or of a directory of files.
pub(super) fn list(input: &Path, split: Option<Split>) -> Result<Builder> {
    let files = files_of_split(input, split, |name| name.to_ascii_lowercase().ends_with(".parquet"))?;
    let mut builder = Builder::default();
    let mut rows_of_files = Vec::new();
    let mut named = true;
    for (name, path) in &files {
        let before = builder.samples.len();
        let damaged = |reason: String| Error::damaged(path, Fault::Syntax(reason));
        let read = caught(|| read_file(path)).map_err(damaged)?;
        let classes = if read.label.is_some() { read.classes } else { Vec::new() };
        if rows_of_files.is_empty() {
            builder.classes = classes;
        } else if builder.classes != classes {
            let what = format!("`{}` has other class names than `{}`", path.display(), files[0].1.display());
            return Err(Error::invalid(what, "give files of one data set"));
        }
        let labels = read.label.as_ref().map(|values| values.as_slice());
        let image = read.file.image;
        let starts = read.file.starts.clone();
        let groups: Vec<u64> = read
            .file
            .metadata
            .row_groups()
            .iter()
            .map(|group| {
                let column = group.column(image);
                column.uncompressed_size().max(0) as u64 / group.num_rows().max(1) as u64
            })
            .collect();
        let archive = builder.add_archive(Archive::Parquet(Box::new(read.file)));
        named &= read.paths.is_some();
        let rows = starts.last().copied().unwrap_or(0);
        let mut group = 0;
        for row in 0..rows {
            while starts[group + 1] <= row {
                group += 1;
            }
            let label = labels.and_then(|labels| labels.get(row as usize)).copied().flatten().unwrap_or(-1);
            let number;
            let sample_name = match read.paths.as_ref().filter(|_| named).and_then(|paths| paths.get(row as usize)) {
                Some(path) => path.as_str(),
                None => {
                    number = format!("{name}/{row}");
                    &number
                }
            };
            let known = builder.classes.is_empty() || label < builder.classes.len() as i64;
            match check_label(label) {
                Ok(label) if known => builder.push(sample_name, label, groups[group], Place::Row { archive, row }),
                Ok(label) => builder.refuse(
                    sample_name,
                    format!("its label {label} is outside the {} classes of the file", builder.classes.len()),
                ),
                Err(reason) => builder.refuse(sample_name, reason),
            }
        }
        rows_of_files.push((before, builder.samples.len()));
    }
    if !named || !unique(&builder) {
        for ((name, _), (start, end)) in files.iter().zip(rows_of_files) {
            for (row, sample) in builder.samples[start..end].iter_mut().enumerate() {
                let name = format!("{name}/{row}");
                sample.id = shared::shard::sample_id(&name);
                sample.name = name.into();
            }
        }
    }
    if builder.classes.is_empty() {
        builder.number_classes();
    }
    Ok(builder)
}

fn unique(builder: &Builder) -> bool {
    let mut ids: Vec<u64> = builder.samples.iter().map(|sample| sample.id).collect();
    ids.sort_unstable();
    ids.windows(2).all(|pair| pair[0] != pair[1])
}

/// Runs what reads a file of unknown origin: a panic becomes an error.
pub(super) fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_panic| Err("the Parquet reader gave up on it".into()))
}

/// What the columns beside the images say.
struct Columns {
    file: ParquetFile,
    /// `image.path` of every row, when there is one in each.
    paths: Option<Vec<String>>,
    label: Option<Vec<Option<i64>>>,
    classes: Vec<String>,
}

fn read_file(path: &Path) -> Result<Columns, String> {
    let text = |e: parquet::errors::ParquetError| one_line(&e.to_string());
    let file = File::open(path).map_err(|e| e.to_string())?;
    let pages = Arc::new(Pages::new(file).map_err(|e| e.to_string())?);
    let metadata = Arc::new(ParquetMetaDataReader::new().parse_and_finish(&*pages).map_err(text)?);
    let columns = metadata.file_metadata().schema_descr().columns();
    let find = |names: &[String], kinds: &[Type]| {
        let flat = |column: &ColumnDescriptor| column.max_rep_level() == 0 && kinds.contains(&column.physical_type());
        names.iter().find_map(|name| columns.iter().position(|c| c.path().string() == *name && flat(c)))
    };
    let names: Vec<String> =
        IMAGE_COLUMNS.iter().flat_map(|name| [format!("{name}.bytes"), (*name).to_string()]).collect();
    let image = find(&names, &[Type::BYTE_ARRAY]).ok_or_else(|| {
        let there: Vec<String> = columns.iter().take(8).map(|column| column.path().string()).collect();
        format!("it has no column `image` of images, its columns are `{}`", there.join("`, `"))
    })?;
    let image_path = columns[image].path().parts().first().map(|name| format!("{name}.path"));
    let image_path = image_path.and_then(|name| find(&[name], &[Type::BYTE_ARRAY]));
    let names: Vec<String> = LABEL_COLUMNS.iter().map(ToString::to_string).collect();
    let label = find(&names, &[Type::INT64, Type::INT32]);
    let mut starts = vec![0u32];
    for group in metadata.row_groups() {
        let rows = u32::try_from(group.num_rows()).ok();
        let next = rows.and_then(|rows| starts.last().and_then(|start| start.checked_add(rows)));
        starts.push(next.ok_or("it has too many rows")?);
    }
    let classes = label.map(|label| class_names(&metadata, &columns[label].path().string())).unwrap_or_default();
    let labels = match label.map(|label| (label, columns[label].physical_type())) {
        Some((column, Type::INT32)) => {
            Some(read_column::<Int32Type, _>(&pages, &metadata, column, |v| Some(i64::from(v)))?)
        }
        Some((column, _)) => Some(read_column::<Int64Type, _>(&pages, &metadata, column, Some)?),
        None => None,
    };
    let paths = match image_path {
        Some(column) => {
            let paths = read_column::<ByteArrayType, _>(&pages, &metadata, column, |value| {
                value.as_utf8().ok().filter(|text| !text.is_empty()).map(Into::into)
            })?;
            paths.into_iter().collect::<Option<Vec<String>>>()
        }
        None => None,
    };
    let rows = starts.last().copied().unwrap_or(0) as usize;
    if labels.as_ref().is_some_and(|labels| labels.len() != rows) || paths.as_ref().is_some_and(|p| p.len() != rows) {
        return Err(format!("its columns do not have {rows} rows each"));
    }
    let path = path.to_path_buf();
    Ok(Columns { file: ParquetFile { path, metadata, image, starts }, paths, label: labels, classes })
}

/// All values of a small column, none where there is none.
fn read_column<T: DataType, V>(
    pages: &Arc<Pages>,
    metadata: &ParquetMetaData,
    column: usize,
    convert: impl Fn(T::T) -> Option<V>,
) -> Result<Vec<Option<V>>, String> {
    let text = |e: parquet::errors::ParquetError| one_line(&e.to_string());
    let most = metadata.file_metadata().schema_descr().column(column).max_def_level();
    let mut all = Vec::new();
    for group in 0..metadata.num_row_groups() {
        let mut reader: ColumnReaderImpl<T> =
            get_typed_column_reader(column_reader(pages, metadata, group, column).map_err(text)?);
        let (mut values, mut levels) = (Vec::new(), Vec::new());
        loop {
            values.clear();
            levels.clear();
            let (rows, _, _) = reader.read_records(BATCH, Some(&mut levels), None, &mut values).map_err(text)?;
            if rows == 0 {
                break;
            }
            let mut values = values.drain(..);
            let present = |row: usize| most == 0 || levels.get(row) == Some(&most);
            all.extend((0..rows).map(|row| if present(row) { values.next().and_then(&convert) } else { None }));
        }
    }
    Ok(all)
}

/// Names of the classes of a label column by the metadata of `datasets`.
fn class_names(metadata: &ParquetMetaData, column: &str) -> Vec<String> {
    let pairs = metadata.file_metadata().key_value_metadata().into_iter().flatten();
    let text = pairs.filter(|pair| pair.key == "huggingface").find_map(|pair| pair.value.as_deref());
    let info: Option<Value> = text.and_then(|text| serde_json::from_str(text).ok());
    let names = info.as_ref().and_then(|info| info.get("info")?.get("features")?.get(column)?.get("names")?.as_array());
    let names: Option<Vec<String>> =
        names.and_then(|names| names.iter().map(|name| name.as_str().map(Into::into)).collect());
    names.unwrap_or_default()
}

pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
