"""Where images come from: sources are random access to records, made by functions named in configs.

`c.data = dict(name='tfds', dataset='cifar10')` calls `tfds(dataset='cifar10')`. A source is a
`Source` or anything that behaves like one, so one of your own is a function in a module of yours:

  len(source)         number of records
  source[i]           dict(image=[h w c], label=int32 []); raises where the record is broken
  source.dtype        of every image: uint8 for pictures, float32 for latents and the like, which
                      reach the network as they are
  source.shape        (h, w, c); h and w are None where the images have no one size
  source.classes      number of classes, 0 where there are none (label is then 0)
  source.name_of(i)   what an error calls record i
  source.sizes()      int [n 2], height and width of each image, 0 where it cannot be read; None, or
                      not there, where they are not known before the images are read
  source.captions     a caption of each record, [str, ...]; None, or not there, where there are none
  source.mirrored     whether records hold `mirrored` [h w c] too, of what is no mirror image of
                      itself mirrored; None, or not there, where the image is
  source.made         of latents, what of the set's info.json tells how they were made

and, where many records are read faster at once, `source.__getitems__([i, ...])`, a list of them.
Nothing is decoded before a record is asked for, and a source pickles, so that worker processes can
do the decoding.
"""

import dataclasses
import difflib
import functools
import io
import itertools
import json
import os
import zipfile
from collections.abc import Callable

from etils import epath
import numpy as np

from diffax.data import parts

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP')  # by their bytes; EPS, for one, would start a program
DIGITS = 'zero one two three four five six seven eight nine'.split()
PIXELS = 10**8  # of an image file, at the most
CAPTIONS = 'captions.jsonl'
ARRAYS = {'images.npy': ('uint8',), 'latents.npy': ('float16', 'float32')}  # of `arrays`


@dataclasses.dataclass(frozen=True)
class Source:
  """Random access to `length` images; `read(i) -> ([h w c] of `dtype`, label)` must pickle.

  It may give a third, {name: array} of what else is in the record. read_many: the same of
  [i, ...], a list; for what is read faster at once.
  """
  read: Callable
  name_of: Callable[[int], str]
  length: int
  shape: tuple[int | None, int | None, int]
  classes: int
  dtype: np.dtype = np.dtype(np.uint8)
  read_many: Callable | None = None
  captions: tuple | None = None
  sizes: Callable | None = None
  mirrored: bool | None = None
  made: dict | None = None

  def __len__(self):
    return self.length

  def __getitem__(self, i):
    if not 0 <= i < self.length:  # also what ends `for record in source`
      raise IndexError(f'record {i} of {self.length}')
    return _record(*self.read(int(i)))

  def __getitems__(self, indices):
    """[record, ...] of many places, as grain and PyTorch name it; raises where one is broken."""
    if not self.read_many:
      return [self[i] for i in indices]
    return [_record(*read) for read in self.read_many(indices)]


def _record(image, label, more=None):
  return dict(image=image, label=np.int32(label), **(more or {}))


# digits: 8x8, inside scikit-learn, so that everything runs before anything is downloaded


def digits(split='train') -> Source:
  """The UCI handwritten digits of scikit-learn, [8 8 1], 10 classes, captions 'zero' to 'nine'.

  Args:
    split: 'test' is every fifth image (i % 5 == 4, 359 in all), 'train' the other 1438, or 'all'.
  """
  _known('split of digits', split, ('train', 'test', 'all'))
  from sklearn import datasets
  data = datasets.load_digits()
  held_out = np.arange(len(data.images)) % 5 == 4
  keep = {'train': ~held_out, 'test': held_out, 'all': held_out | True}[split]
  images = np.rint(data.images[keep, :, :, None] * (255 / 16)).astype(np.uint8)  # 16 grey levels
  labels = data.target[keep].astype(np.int32)
  return Source(
    read=functools.partial(_read_memory, images, labels),
    name_of=functools.partial(_record_name, f'digits/{split}'),
    length=len(images), shape=images.shape[1:], classes=10,
    captions=tuple(DIGITS[label] for label in labels))


def _read_memory(images, labels, i):
  return images[i], labels[i]


def _record_name(what, i):
  return f'{what} record {i}'


def blank(size=512, channels=3, classes=0) -> Source:
  """One grey picture [size size channels]: for released weights, to sample from without data.

  classes: how many labels those know.
  """
  return Source(
    read=functools.partial(_read_memory, np.full((1, size, size, channels), 127, np.uint8), [0]),
    name_of=functools.partial(_record_name, 'blank'), length=1, shape=(size, size, channels),
    classes=classes)


# tfds: any prepared image set of TensorFlow Datasets, read without TensorFlow


def tfds(dataset, split='train', data_dir=None) -> Source:
  """An image set of TensorFlow Datasets, prepared in the array_record format; never downloads.

  Args:
    dataset: 'cifar10', 'imagenet_resized/64x64' or, to hold to a version, 'cifar10:3.0.2'.
    split: any split of the set, also a part of one: 'train[:1000]', 'train[90%:]'.
    data_dir: the folder that holds the prepared sets, gs:// too; $DIFFAX_DATA/tfds by default,
      and ../shared/data/tfds where DIFFAX_DATA is not set.

  Raises:
    ValueError: the set or the split is not there, or the set has no uint8 image.
  """
  if data_dir is None:
    data_dir = os.path.join(os.environ.get('DIFFAX_DATA') or '../shared/data', 'tfds')
  prepared = _prepared(data_dir)
  _known(f'dataset in {data_dir}', dataset, prepared,
         "prepare it with tfds.builder(name, data_dir=..., file_format='array_record')"
         '.download_and_prepare(), or point --config.data.data_dir or DIFFAX_DATA at it')
  import tensorflow_datasets
  builder = tensorflow_datasets.builder_from_directory(prepared[dataset])
  if not isinstance(split, str) or split.split('[')[0] not in builder.info.splits:
    _known(f'split of {dataset}', split, builder.info.splits)
  feature, (h, w, c), classes = _image_feature(dataset, builder.info.features)
  raw = tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES
  try:
    # tfds's own decoding takes nearly twice as long, and cannot bring a grey JPEG to 3 channels
    records = builder.as_data_source(split, deserialize_method=raw, file_format='array_record')
  except ValueError as e:  # a malformed slice such as train[:1x]
    raise ValueError(f'{dataset} cannot read split {split!r}: {_one_line(e)}') from e
  except NotImplementedError as e:
    raise ValueError(f'{prepared[dataset]} is not in a format of random access: prepare it again '
                     "with file_format='array_record'") from e
  what = records, feature, c, 'label' if classes else None
  return Source(
    read=functools.partial(_read_tfds, *what), read_many=functools.partial(_read_many_tfds, *what),
    name_of=functools.partial(_record_name, f'{dataset}/{split}'),
    length=len(records), shape=(h, w, c), classes=classes)


def _prepared(data_dir):
  """{'cifar10': path of the newest version, 'cifar10:3.0.2': path, ...} of a TFDS folder."""
  root = epath.Path(data_dir)
  if not root.exists():
    raise ValueError(f'there is no folder {data_dir}: set DIFFAX_DATA to the one that holds tfds/, '
                     'or --config.data.data_dir to the one that holds the prepared sets')
  found = {}
  for depth in ('*/*', '*/*/*'):  # name/version and name/config/version
    for info in root.glob(f'{depth}/dataset_info.json'):
      *name, version = info.parent.relative_to(root).parts
      found['/'.join(name), version] = str(info.parent)
  newest = sorted(found, key=lambda key: [int(n) for n in key[1].split('.') if n.isdigit()])
  paths = {name: found[name, version] for name, version in newest}
  return paths | {f'{name}:{version}': path for (name, version), path in found.items()}


def _image_feature(dataset, features):
  """Name of the image among a set's features, its shape [h w c], the number of classes."""
  import tensorflow_datasets
  kinds = tensorflow_datasets.features
  names = [name for name, f in features.items() if isinstance(f, kinds.Image)]
  name = 'image' if 'image' in names else next(iter(names), None)
  image = features[name] if name else None
  if image is None or image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3):
    raise ValueError(f'{dataset} has no uint8 image of 1 or 3 channels: {_one_line(features)}')
  label = dict(features.items()).get('label')
  classes = label.num_classes if isinstance(label, kinds.ClassLabel) else 0
  return name, image.shape, classes or 0


def _read_tfds(records, feature, channels, label, i):
  return _example(records[i], feature, channels, label)


def _read_many_tfds(records, feature, channels, label, indices):
  # reading one by one takes up to three times as long as reading at once
  return [_example(data, feature, channels, label) for data in records.__getitems__(indices)]


def _example(data, feature, channels, label):
  """(image, label) of a serialized tf.train.Example."""
  from tensorflow_datasets.proto import tf_example_pb2
  record = tf_example_pb2.Example.FromString(data).features.feature
  image = decode(record[feature].bytes_list.value[0], channels)
  return image, record[label].int64_list.value[0] if label else 0


# folder: one image file a record


def folder(path, split='train', channels=3) -> Source:
  """Image files: path/split/class/*.png, or path/class/*.png where no split folder is there.

  The classes are the subfolders in alphabetical order; a folder that holds the images themselves
  has none. Files that end in none of `SUFFIXES` are passed over.

  Args:
    path: a folder, gs:// too.
    split: name of a subfolder; only 'train' may be missing, and is then all that `path` holds.
    channels: 3 for RGB, 1 for grey; every image is brought to it.

  Raises:
    ValueError: there is no such folder or split, or no image in it.
  """
  _known('number of channels', channels, (1, 3))
  root = epath.Path(path)
  if not root.is_dir():
    raise ValueError(f'there is no folder {str(path)!r}: set --config.data.path to the images')
  parts = sorted(p.name for p in root.iterdir() if p.is_dir())
  # a folder of other splits must not be taken for a folder of classes
  if split in parts or split != 'train' or {'test', 'val', 'valid', 'validation'} & set(parts):
    _known(f'split in {path}', split, parts)
    root = root / split
  names = sorted(p.name for p in root.iterdir() if p.is_dir())
  files, labels = _list_images(root), []
  if names and files:
    raise ValueError(f'{root} holds images beside class folders: move {files[0]} into a class')
  if names:
    by_class = [_list_images(root / name) for name in names]
    files = list(itertools.chain(*by_class))
    labels = np.repeat(np.arange(len(names), dtype=np.int32), [len(fs) for fs in by_class])
  if not files:
    raise ValueError(f'no image in {root} or its class folders: '
                     f'files must end in {", ".join(SUFFIXES)}')
  return Source(
    read=functools.partial(_read_file, files, labels, channels), name_of=files.__getitem__,
    length=len(files), shape=(None, None, channels), classes=len(names),
    sizes=functools.partial(_file_sizes, tuple(files)))


@functools.lru_cache(maxsize=4)
def _file_sizes(files):
  """Height and width of image files by their headers, int [n 2]; 0 for those that are broken."""
  from concurrent import futures
  with futures.ThreadPoolExecutor(16) as pool:
    return np.asarray(list(pool.map(_file_size, files)), np.int64)


def _file_size(name):
  from PIL import Image
  try:
    with epath.Path(name).open('rb') as file, Image.open(file, formats=FORMATS) as image:
      return image.height, image.width
  except Exception:  # of many kinds
    return 0, 0


def _list_images(path):
  return sorted(str(p) for p in path.iterdir() if p.suffix.lower() in SUFFIXES)


def _read_file(files, labels, channels, i):
  return decode(epath.Path(files[i]).read_bytes(), channels), labels[i] if len(labels) else 0


def decode(data, channels):
  """Bytes of an image file -> uint8 [h w c]; raises where they are broken or hold more than 8 bits.

  What the bytes are is told by themselves, whatever the file's name says: one of FORMATS. An alpha
  channel is dropped and the EXIF orientation ignored, as is usual with training sets.
  """
  from PIL import Image
  from PIL import UnidentifiedImageError
  try:
    opened = Image.open(io.BytesIO(data), formats=FORMATS)
  except UnidentifiedImageError:  # whose own words name an object of Python
    raise ValueError(f'its bytes are not those of {", ".join(FORMATS)}') from None
  with opened as image:
    if image.width * image.height > PIXELS:  # a small file may say it is huge, to fill the memory
      raise ValueError(f'{image.width} x {image.height} are more than {PIXELS} pixels: make it '
                       'smaller, if it is to be trusted')
    if image.mode in ('I', 'F') or image.mode.startswith('I;'):  # PIL would clip these to 255
      raise ValueError(f'{image.mode} images have more than 8 bits: convert them to 8')
    mode = {1: 'L', 3: 'RGB'}[channels]
    pixels = np.array(image if image.mode == mode else image.convert(mode))
  return pixels[:, :, None] if channels == 1 else pixels


# arrays: one file of equal records, above all latents of an autoencoder


def arrays(path, split='train') -> Source:
  """Records of one array, memory-mapped: pictures or latents, and their labels where there are any.

  A folder path/split, or `path` itself for 'train', holds either of

    images.npy    uint8 [n h w c]
    latents.npy   float16 or float32 [n h w c], given to the network as float32, unscaled: store
                  them at the scale the schedule expects, about unit variance

  and may hold labels.npy, integers [n] from 0, of which there are max + 1 classes. To make one:

    out = np.lib.format.open_memmap('latents.npy', 'w+', np.float16, (n, 32, 32, 4))
    out[i:i + len(z)] = z                    # a batch at a time; out.flush() at the end
    np.save('labels.npy', labels)

  Args:
    path: a folder on a local disk.
    split: name of a subfolder; only 'train' may be missing, and is then what `path` holds.

  Raises:
    ValueError: there is no such folder, split or file, or its rank, dtype or count is another. No
      file is unpickled.
  """
  path = _of_split(path, split, 'images.npy or latents.npy')
  present = [name for name in ARRAYS if os.path.exists(os.path.join(path, name))]
  if len(present) != 1:
    raise ValueError(f'{path} holds {" and ".join(present) or "no array"}: '
                     f'put one file there, {" or ".join(ARRAYS)}')
  file = os.path.join(path, present[0])
  records = _mapped(file, os.stat(file).st_mtime_ns)
  allowed = ARRAYS[present[0]]
  if records.ndim != 4 or records.dtype.name not in allowed:
    raise ValueError(f'{file} is {records.dtype} {list(records.shape)}: '
                     f'it must be {" or ".join(allowed)} [n h w c]')
  labels = _labels(os.path.join(path, 'labels.npy'), len(records))
  return Source(
    read=functools.partial(_read_array, file, os.stat(file).st_mtime_ns, labels),
    name_of=functools.partial(_record_name, file), length=len(records), shape=records.shape[1:],
    classes=int(labels.max(initial=-1)) + 1,
    dtype=np.dtype(np.uint8 if records.dtype == np.uint8 else np.float32))


def _of_split(path, split, holds):
  """The folder of a split, path/split, or `path` itself for 'train'."""
  if not os.path.isdir(path):
    raise ValueError(f'there is no folder {str(path)!r} on this machine: set --config.data.path to '
                     f'the one that holds {holds}')
  folders = sorted(p.name for p in os.scandir(path) if p.is_dir())
  if split in folders or split != 'train':
    _known(f'split in {path}', split, folders)
    return os.path.join(path, split)
  return os.fspath(path)


def _labels(file, count):
  """int32 [count] of a labels.npy, [0] where there is none."""
  if not os.path.exists(file):
    return np.zeros(0, np.int32)
  labels = _mapped(file, os.stat(file).st_mtime_ns)
  if labels.shape != (count,) or labels.dtype.kind not in 'iu':
    raise ValueError(f'{file} is {labels.dtype} {list(labels.shape)}: '
                     f'it must be integers [{count}], one for each record')
  if labels.min(initial=0) < 0:
    raise ValueError(f'{file} has a label {labels.min()}: labels count from 0')
  return np.asarray(labels, np.int32)


@functools.lru_cache(maxsize=8)
def _mapped(file, stamp):
  """The array of a .npy file, opened once a process: a map would pickle as all that it maps."""
  del stamp  # when it was written: a file made anew is opened anew
  try:
    return np.load(file, mmap_mode='r', allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:  # cut short, objects, or no .npy at all
    raise ValueError(f'{file} is no readable array ({_one_line(e)}): '
                     'write it with np.save or open_memmap') from e


def _read_array(file, stamp, labels, i):
  image = np.array(_mapped(file, stamp)[i])  # [h w c]
  if image.dtype != np.uint8:
    image = image.astype(np.float32)
  return image, labels[i] if len(labels) else 0


# latents: what an autoencoder makes of pictures, written by --mode encode


def latents(path, split='train') -> Source:
  """A latent data set of --mode encode: what is known of each picture's latents, [h w k].

  That is mean and log variance, of which training draws with config.latent naming the autoencoder
  that made them, or none, where samples stay latents. Records hold what was cached of their texts.

  Args:
    path: a folder on a local disk.
    split: name of a subfolder; only 'train' may be missing, and is then what `path` holds.

  Raises:
    ValueError: there is no such folder or split, the set is not finished, or a file of it is
      missing or of another size. On access, a record is damaged.
  """
  path = _of_split(path, split, 'what --mode encode wrote')
  said = parts.info(path)
  dtype, plan = parts.layout(said['record']), {k: said[k] for k in ('count', 'part')}
  captions = None
  if said['captions']:
    captions = tuple(json.loads(parts.whole(path, said, parts.CAPTIONS)))
    if len(captions) != said['count']:
      raise ValueError(f'{path}/{parts.CAPTIONS} holds {len(captions)} captions for '
                       f'{said["count"]} records: it was changed')
  read_many = functools.partial(_read_latents, path, plan, dtype)
  return Source(
    read=functools.partial(_read_latent, read_many), read_many=read_many,
    name_of=functools.partial(_record_name, path), length=said['count'],
    shape=dtype['moments'].shape, classes=said['classes'], dtype=np.dtype(np.float32),
    captions=captions, mirrored='mirrored' in dtype.names,
    made={k: said[k] for k in ('latent', 'text', 'files')} | {'path': path})


def _read_latent(read_many, i):
  return read_many([i])[0]


def _read_latents(path, plan, dtype, indices):
  more = [name for name in dtype.names if name not in ('index', 'label', 'moments')]
  return [
    (row['moments'].astype(np.float32), row['label'], {name: row[name] for name in more})
    for row in parts.rows(path, plan, dtype, indices)
  ]


# captioned: pictures with a line of text each


def captioned(path, split='train', channels=3, without=()) -> Source:
  """Pictures with captions: a folder with captions.jsonl, one JSON object a line and a picture.

  Each says `caption`, and where its picture is: `file`, a path within the folder, or `index`, a row
  of `image` uint8 [n h w 3] in the folder's one .npz file. A `split` it says must be the one asked
  for; lines without are of all.

  Args:
    path: a folder, gs:// too.
    split: 'train', 'test' or what the lines say; 'all'.
    channels: of picture files, 3 for RGB, 1 for grey.
    without: captions to leave out, with all that go on behind a colon ('woman mage' and 'woman
      mage: dark skin tone'), as prompts that training is not to see.

  Raises:
    ValueError: there is no such folder, line, split or caption, a line is broken, or a file is not
      within the folder.
  """
  root = epath.Path(path)
  if not (root / CAPTIONS).exists():
    raise ValueError(f'there is no {CAPTIONS} in {str(path)!r}: one line a picture, as '
                     '{"file": "a.png", "caption": "a red heart"}')
  lines = [_line(root, n, text) for n, text in enumerate(_lines(root), 1)]
  splits = {line['split'] for line in lines if 'split' in line}
  if splits and all('split' in line for line in lines):
    _known(f'split in {path}', split, splits | {'all'})
  lines = _left(lines, without, root)
  lines = [line for line in lines if split == 'all' or line.get('split', split) == split]
  if not lines:
    raise ValueError(f'{root / CAPTIONS} has no line: write one for each picture')
  captions = tuple(line['caption'] for line in lines)
  files = ['file' in line for line in lines]
  if all(files):
    names = [str(root / line['file']) for line in lines]
    return Source(
      read=functools.partial(_read_file, names, (), channels), name_of=names.__getitem__,
      length=len(names), shape=(None, None, channels), classes=0, captions=captions,
      sizes=functools.partial(_file_sizes, tuple(names)))
  if any(files):
    raise ValueError(f'{root / CAPTIONS}: some lines say `file` and some `index`: say one in all')
  held, name = _packed(root)
  rows = np.asarray([line['index'] for line in lines])
  if rows.min() < 0 or rows.max() >= len(held):
    raise ValueError(f'{root / CAPTIONS} names index {rows.max()}, and {name} holds {len(held)}')
  return Source(
    read=functools.partial(_read_packed, name, epath.Path(name).stat().mtime, rows),
    name_of=functools.partial(_record_name, f'{root}/{split}'), length=len(rows),
    shape=held.shape[1:], classes=0, captions=captions)


def _left(lines, without, root):
  """The lines whose captions are none of those. Raises ValueError for one that none is."""
  is_of = lambda caption, out: caption == out or caption.startswith(f'{out}:')
  for out in without:
    if not any(is_of(line['caption'], out) for line in lines):
      raise ValueError(f'without={out!r}: no caption in {root / CAPTIONS} is this, or this and ":"')
  return [line for line in lines if not any(is_of(line['caption'], out) for out in without)]


def emoji(split='train', path='', without=()) -> Source:
  """Emoji of 64 pixels with English captions, [64 64 3]; see `captioned` for the arguments.

  path: '' is $DIFFAX_DATA/emoji, ../shared/data/emoji where DIFFAX_DATA is not set.
  """
  path = path or os.path.join(os.environ.get('DIFFAX_DATA') or '../shared/data', 'emoji')
  if not epath.Path(path).exists():
    raise ValueError(f'there is no folder {path}: set DIFFAX_DATA to the one that holds emoji/')
  return captioned(path, split, without=without)


def _lines(root):
  return [text for text in (root / CAPTIONS).read_text().splitlines() if text.strip()]


def _line(root, number, text):
  """One line of captions.jsonl. Raises ValueError that names it."""
  where = f'{root / CAPTIONS} line {number}'
  try:
    line = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise ValueError(f'{where} is no JSON ({_one_line(e)})') from e
  if not isinstance(line, dict) or not isinstance(line.get('caption'), str):
    raise ValueError(f'{where} says no `caption`: as {{"file": "a.png", "caption": "a red heart"}}')
  if not isinstance(line.get('file', ''), str) or not isinstance(line.get('index', 0), int):
    raise ValueError(f'{where}: `file` is a path within the folder, `index` a number')
  if not {'file', 'index'} & set(line):
    raise ValueError(f'{where} says neither `file` nor `index`: which picture is it of?')
  parts = line.get('file', '').replace('\\', '/').split('/')
  if line.get('file', '').startswith(('/', '~')) or '..' in parts or ':' in parts[0]:
    raise ValueError(f'{where}: {line["file"]!r} leaves the folder: name a path within it')
  return line


def _packed(root):
  """(images [n h w c], name) of a folder's one .npz file."""
  files = sorted(str(p) for p in root.iterdir() if p.suffix == '.npz')
  if len(files) != 1:
    raise ValueError(f'{root} holds {len(files)} .npz files, and its captions name rows of one: '
                     f'{", ".join(files) or "put it there"}')
  return _unpacked(files[0], epath.Path(files[0]).stat().mtime), files[0]


@functools.lru_cache(maxsize=2)
def _unpacked(file, stamp):
  del stamp
  try:
    with np.load(io.BytesIO(epath.Path(file).read_bytes()), allow_pickle=False) as held:
      images = held['image']
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(f'{file} holds no readable `image` ({_one_line(e)}): write it with '
                     'np.savez_compressed(file, image=images)') from e
  if images.dtype != np.uint8 or images.ndim != 4:
    raise ValueError(f'{file}: image is {images.dtype} {list(images.shape)}: it must be uint8 '
                     '[n h w c]')
  return images


def _read_packed(file, stamp, rows, i):
  return _unpacked(file, stamp)[rows[i]], 0


def _known(what, value, allowed, remedy=''):
  """Raises a ValueError that lists what is allowed, and what is near, unless value is among it."""
  allowed = list(allowed)
  if value in allowed:
    return
  shown = sorted(str(a) for a in allowed if ':' not in str(a))  # versions only where asked for
  pool = [str(a) for a in allowed] if ':' in str(value) else shown
  near = difflib.get_close_matches(str(value), pool, n=3)
  raise ValueError(''.join([
    f'no {what} is {value!r}: there is {", ".join(shown) or "none"}',
    f'; did you mean {" or ".join(near)}?' if near else '', f'; {remedy}' if remedy else '']))


def _one_line(text):
  return ' '.join(str(text).split())
