"""Images for training: a folder or a zip of photographs, or toy images that this file draws.

    from data import load_images
    images = load_images("photos.zip", 64, 64)  # (n, 64, 64, 3) uint8, mapped from a file, not in memory
    images = load_images("toy:faces", 32, 32)   # needs no photographs

Every source is decoded once, into one .npy file in the cache folder. Later starts map that file.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import re
import stat
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# Pillow goes by content, not by name. Other decoders must not run: PostScript would start Ghostscript.
FORMATS = ("JPEG", "JPEG2000", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = tuple(e for e, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO"))
FORMATS = tuple(kind for kind in FORMATS if kind in Image.OPEN)  # older ones have no AVIF
# Folders of other programs, beside those whose names begin with a dot, and a mark in those of this one.
SYSTEM = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found")
MARK = ".made-by-coco-gan"
CROPS = ("auto", "center", "celeba", "squash", "celeba-syn")
CACHE_VERSION = 3  # raise it when the same input gives other pixels than before
MAX_PIXELS = 2**28  # 16,384 x 16,384
MAX_FILE_BYTES = 6 * MAX_PIXELS  # three 16-bit values for each
MAX_SCANNED = 2**32  # pixels times scans of a progressive JPEG; ten scans are usual
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow itself refuses twice as many, and warns between
ONE_LARGE = threading.Lock()  # held by the one thread that has an image of more than LARGE pixels
LARGE = 2**25


class UserError(ValueError):
    """A mistake that the user can fix. Its message is the one line that they see."""

    def __str__(self) -> str:  # it may quote a file name, with line ends and commands to the terminal
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


# ---- Files that appear under their names only when they are complete ---------------------------------------


@contextlib.contextmanager
def atomic(path: Path) -> Iterator:
    """A binary file to write, which gets its name when the block ends well. Else nothing is left of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # as when the disk is full
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, contents: bytes) -> None:
    """Write a file completely or not at all. Raises: OSError, with the name of the file."""
    with atomic(path) as file:
        file.write(contents)


def make_folder(path: Path) -> None:
    """Make a folder and those above it. The new ones get a MARK, by which `load_images` passes over them."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        (folder / MARK).touch()


# ---- On a terminal, a line that is renewed -----------------------------------------------------------------


def progress(text: str = "") -> None:
    """Renew the line on a terminal, and nowhere else. Without a text, clear it."""
    if sys.stderr.isatty():
        print(f"\r{text:40}" + "\r" * (not text), end="", file=sys.stderr, flush=True)


def counted(items: Iterable, count: int, what: str) -> Iterator:
    """The items, which are made as they are asked for. From the third second on, `progress` counts them."""
    due = time.monotonic() + 2
    for done, item in enumerate(items, 1):
        if done == count:
            progress()
        elif time.monotonic() > due:
            progress(f"{done:,} of {count:,} {what}")
            due = time.monotonic() + 0.2
        yield item


# ---- Loading -----------------------------------------------------------------------------------------------


def load_images(
    source: str,
    height: int,
    width: int,
    *,
    crop: str = "auto",
    cache: str | Path = "cache",
    seed: int = 0,
    toy_count: int = 4096,
) -> np.ndarray:
    """Map the images of a source, all of one size, and decode them first if no earlier call did.

    Args:
        source: a folder or a zip of photographs, or one of TOYS.
        height, width: size of every image in pixels.
        crop: "center", the largest centred rectangle of the right shape; "celeba", the paper's rows 50 to 177
            and columns 25 to 152 of an aligned 218 x 178 image; "celeba-syn", the same, moved by
            `displacement` for each image; "squash", the whole image, out of shape; "auto", "celeba" for
            square images of a source where all are 218 x 178, and "center" for all others.
        cache: folder of the decoded file; seed: of the displacements; toy_count: how many toys to draw.

    Returns: np.memmap (n, height, width, 3), uint8, RGB, in the order of the sorted names.
    Raises: UserError.
    """
    source = os.path.expanduser(source)
    if source in TOYS:
        if crop not in ("auto", "center"):
            raise UserError(f"--crop {crop} is for photographs; leave it out, for {source} needs no crop")
        names, identity = [], [source, toy_count]
    else:
        names, read, identity = list_images(source)
    cut = f"{height}x{width}-{crop}" + (f"-{seed}" if crop == "celeba-syn" else "")
    key = hashlib.sha256(os.fsencode(f"{CACHE_VERSION} {cut} {identity}")).hexdigest()[:16]
    title = re.sub(r"[^\w.-]", "_", os.path.basename(os.path.abspath(source)))[:40]
    place = hashlib.sha256(os.fsencode(os.path.abspath(source))).hexdigest()[:4]
    path = Path(cache) / f"{title}-{cut}-{place}-{key}.npy"
    for found in sorted(path.parent.glob(f"*-{key}.npy")):  # wherever the source was then
        with contextlib.suppress(OSError, ValueError, EOFError):  # damaged: made anew
            return open_map(found)
    originals = []  # of each image height, width and the share that the crop keeps
    if source in TOYS:
        images = itertools.chain.from_iterable(TOYS[source](toy_count, height, width))
    elif names:
        if crop == "auto" and not (height == width and are_celeba(names, read)):
            crop = "center"
        images = decode_all(names, read, height, width, crop, seed, originals)
    else:
        raise UserError(f"--data {source} holds no image; looked for .jpg, .png and what else Pillow reads")
    make_folder(path.parent)
    with atomic(path) as file:
        file.write(bytes(128))  # of the header, which NumPy pads to a multiple of 64
        count = sum(file.write(np.ascontiguousarray(image)) > 0 for image in images)
        each = [(*original, n) for original, n in Counter(originals).items()]
        file.write(json.dumps(each).encode())  # where np.load does not look, for `report_originals`
        header = io.BytesIO()
        shape = dict(descr="|u1", fortran_order=False, shape=(count, height, width, 3))
        np.lib.format.write_array_header_1_0(header, shape)
        file.seek(0)
        file.write(header.getvalue())
    for old in path.parent.glob(f"{title}-{cut}-{place}-*.npy"):  # of the source as it was before
        if old != path:
            with contextlib.suppress(OSError):  # Windows keeps a file that is mapped
                old.unlink()
    return open_map(path)


def open_map(path: Path) -> np.ndarray:
    images = np.load(path, mmap_mode="c")  # copy on write: PyTorch asks for memory that can be written
    if hasattr(mmap, "MADV_RANDOM"):
        images._mmap.madvise(mmap.MADV_RANDOM)  # batches jump about, so reading ahead is wasted
    return images


def report_originals(images: np.ndarray) -> bool:
    """Tell of which sizes the images of `load_images` were, and what the crop keeps of them.

    Returns: whether most of them are at least twice as wide as high. Of toys nothing is told.
    """
    with open(images.filename, "rb") as file:
        file.seek(images.offset + images.nbytes)
        originals = json.loads(file.read() or "[]")  # a cache of an older version ends with the images
    if not originals:
        return False
    heights, widths, kept, counts = zip(*originals)
    sides = (f"{min(s):,}" if min(s) == max(s) else f"{min(s):,}-{max(s):,}" for s in (heights, widths))
    share = sum(k * n for k, n in zip(kept, counts)) / sum(counts)
    print(f"photographs of {' x '.join(sides)} pixels; the crop keeps {100 * share:.0f} %")
    return sum(n for h, w, _, n in originals if w >= 2 * h) > sum(counts) / 2


def release_pages(images: np.ndarray) -> None:
    """Free the pages of a map, which stay in the system's file cache; does nothing to other arrays.

    Without it, Linux counts up to 2 MB around each byte that was read as memory of the process.
    """
    mapped = getattr(images, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


# ---- Finding -----------------------------------------------------------------------------------------------


def list_images(source: str) -> tuple[list[str], Callable[[str], bytes], list[str]]:
    """The sorted names of the images of a folder, zip or LMDB, what reads one, and what identifies them.

    Raises: UserError. The identity changes when an image does, and costs no reading of images.
    """
    if os.path.isfile(os.path.join(source, "data.mdb")):
        return list_lmdb(source)
    if os.path.isdir(source):
        lines, others = list_folder(source)
        report_others(source, len(lines), others)
        names = [line.rsplit(" ", 2)[0] for line in lines]
        return names, lambda name: read_file(os.path.join(source, name)), lines
    if not os.path.exists(source):
        folder, name = os.path.split(os.path.abspath(source))
        near = difflib.get_close_matches(name, os.listdir(folder) if os.path.isdir(folder) else (), n=1)
        hint = f"did you mean {os.path.join(folder, near[0])}? Give" if near else "give"
        raise UserError(f"--data {source} does not exist; {hint} a folder or a zip, or {' or '.join(TOYS)}")
    try:
        archive, lock = zipfile.ZipFile(source), threading.Lock()  # it counts its readers without a lock
        files = {member.filename: member for member in archive.infolist() if not member.is_dir()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--data {source} {kind_of(source) or f'is no zip that can be read ({error})'}"
        ) from error

    def read(name: str) -> bytes:
        if files[name].file_size > MAX_FILE_BYTES:
            raise ValueError(f"unpacks to {files[name].file_size:,} bytes; {MAX_FILE_BYTES:,} are allowed")
        with lock:
            return archive.read(files[name])

    seen = [name for name in files if not any(map(is_hidden, name.split("/")))]
    names = sorted(name for name in seen if is_image(name))
    report_others(source, len(names), [name for name in seen if not is_image(name)])
    found = os.stat(source)
    return names, read, [os.path.basename(source), found.st_size, found.st_mtime_ns]


def list_lmdb(source: str) -> tuple[list[str], Callable[[str], bytes], list[str]]:
    """As `list_images`, of the LMDB that LSUN is distributed as: each value is the file of an image."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"--data {source} is an LMDB; pip install lmdb, or export its images") from error
    try:
        database = lmdb.open(source, readonly=True, lock=False, readahead=False)
        with database.begin() as transaction:
            names = sorted(key.hex() for key in transaction.cursor().iternext(values=False))
    except lmdb.Error as error:
        raise UserError(
            f"--data {source} is an LMDB that cannot be read ({error}); download it again"
        ) from error

    def read(name: str) -> bytes:
        with database.begin() as transaction:
            return transaction.get(bytes.fromhex(name))

    found = os.stat(os.path.join(source, "data.mdb"))
    return names, read, [os.path.basename(source), found.st_size, found.st_mtime_ns]


def report_others(source: str, count: int, others: list[str]) -> None:
    """Count the files that are no images, by ending. Raises: UserError where only an archive is there."""
    for name in others if count == 0 else ():
        if name.endswith("data.mdb"):
            folder = os.path.dirname(os.path.join(source, name))
            raise UserError(f"--data {source} holds no image, but an LMDB; give --data {folder}")
        if name.lower().endswith((".zip", ".tar", ".tgz", ".gz", ".7z", ".rar", ".parquet")):
            hint = "give it" if name.lower().endswith(".zip") else "unpack it"
            raise UserError(f"--data {source} holds no image, but {name}; {hint}")
    endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in others)
    if endings:
        found = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(8))
        print(f"{source}: not read as images: {found}", file=sys.stderr)


def kind_of(path: str) -> str | None:
    """What a file is that is no zip, and what to do with it; None if that is not known."""
    with open(path, "rb") as file:
        head = file.read(512).lstrip().lower()
    if is_image(path):
        return f"is one image; give its folder, {os.path.dirname(os.path.abspath(path))}"
    if head.startswith((b"<!doctype", b"<html")):
        return "is a page of HTML, as a failed download leaves; download it again"
    if head.startswith(b"par1"):
        return "is a Parquet file; export its images to a folder"
    if tarfile.is_tarfile(path) or head.startswith((b"7z\xbc\xaf", b"rar!", b"\x1f\x8b")):
        return "is an archive but no zip; unpack it and give the folder"
    return "is a Git LFS pointer; run git lfs pull" if head.startswith(b"version https://git-lfs") else None


def is_hidden(name: str) -> bool:
    """Whether a file or a folder is not the user's, by its name."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def list_folder(root: str) -> tuple[list[str], list[str]]:
    """ "NAME SIZE MTIME" of every image below a folder, sorted, and the names of all other files."""
    lines, others, folders, seen, unlisted = [], [], [""], set(), []
    while folders:
        folder = folders.pop()
        where = os.path.join(root, folder)
        if os.path.realpath(where) in seen:  # a link may lead back up
            continue
        seen.add(os.path.realpath(where))
        try:
            entries = [
                entry for entry in os.scandir(where) if entry.name == MARK or not is_hidden(entry.name)
            ]
        except OSError as error:
            if folder == "":
                raise UserError(f"--data {root} cannot be listed: {error.strerror}") from error
            unlisted.append(f"{where}: {error.strerror}")
            continue
        if folder and any(entry.name == MARK for entry in entries):
            continue
        for entry in entries:
            name = folder + entry.name
            try:
                if entry.is_dir():
                    folders.append(f"{name}/")
                elif not is_image(name):
                    others += [name] * (entry.name != MARK)
                elif stat.S_ISREG((found := entry.stat()).st_mode):  # reading a named pipe would never end
                    lines.append(f"{name} {found.st_size} {found.st_mtime_ns}")
            except OSError:
                lines.append(f"{name} -1 -1")  # a dead link, which is counted as skipped
    report_skipped(unlisted, len(seen), "folders")
    return sorted(lines), others


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file. Raises: OSError, or ValueError for one that is too large."""
    size = os.path.getsize(path)
    if size > MAX_FILE_BYTES:  # a sparse file of that size takes nothing of the disk
        raise ValueError(f"has {size:,} bytes; {MAX_FILE_BYTES:,} are allowed")
    return Path(path).read_bytes()


# ---- Decoding: bytes -> upright RGB -> crop -> resize, in threads: Pillow decodes outside Python's lock ----


def in_threads(function: Callable, items: Iterable) -> Iterator:
    """function(item) of each item, in order, with a bounded number of them ahead.

    Where it raises an Exception, the result is the reason, a string.
    """

    def safe(item):
        try:
            return function(item)
        except Exception as error:  # damaged images raise OSError, SyntaxError, struct.error, IndexError, ...
            return reason_of(error)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, 16)  # more have nothing to do, for Python's part of the work is done by one at a time
    pool, items = ThreadPoolExecutor(cores), iter(items)
    try:
        ahead = deque(pool.submit(safe, item) for item in itertools.islice(items, 8 * cores))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(safe, item) for item in itertools.islice(items, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def reason_of(error: Exception) -> str:
    """Why an image could not be read, in one line."""
    if isinstance(error, UnidentifiedImageError):  # its text has an address in memory
        return "is no image that Pillow can read"
    return " ".join(str(error).split()) or type(error).__name__


def are_celeba(names, read) -> bool:
    """Whether all images have the 218 x 178 pixels of the aligned CelebA; if so, says which crop they get."""
    sizes = in_threads(lambda name: Image.open(io.BytesIO(read(name)), formats=FORMATS).size, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = (size for size in counted(sizes, len(names), "images measured") if isinstance(size, tuple))
        found = next(known, None) == (178, 218) and all(size == (178, 218) for size in known)
    if found:
        print("all images are 218 x 178, as the aligned CelebA, and get the paper's crop:")
        print("rows 50 to 177, columns 25 to 152; --crop center cuts out the middle")
    return found


def decode_all(names, read, height: int, width: int, crop: str, seed: int, originals) -> Iterator[np.ndarray]:
    """The images that can be decoded, in order. Others are counted and the first five named, on stderr.

    Args: originals: a list, to which height, width and kept share of each image are added.
    """

    def decode(name: str) -> np.ndarray:
        return decode_image(read(name), height, width, crop, *displacement(seed, name), originals)

    skipped = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 200,000 images have much to warn of
        decoded = counted(zip(names, in_threads(decode, names)), len(names), "images decoded")
        for done, (name, image) in enumerate(decoded, 1):
            if isinstance(image, str):
                skipped.append(f"{name!r}: {image}")
            else:
                yield image
            if done % 10_000 == 0 or done == len(names):
                progress()
                good = done - len(skipped)
                print(f"{good:,} of {len(names):,} images decoded", file=sys.stderr, flush=True)
    if len(skipped) == len(names):
        raise UserError(f"--data: none of the {len(names):,} images can be used; the first: {skipped[0]}")
    report_skipped(skipped, len(names), "images")


def report_skipped(skipped: list[str], count: int, what: str) -> None:
    if skipped:
        first = "\n  ".join(skipped[:5])
        print(f"skipped {len(skipped):,} of {count:,} {what}:\n  {first}", file=sys.stderr)


def displacement(seed: int, name: str) -> tuple[int, int]:
    """How far CelebA-syn moves the crop of an image: dx and dy in pixels, each uniform on -25, -24 … 25.

    It follows from the seed and the image's name alone. Source: section 3.8; whole pixels are ours.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest()
    dx, dy = (int.from_bytes(part, "big") % 51 - 25 for part in (digest[:16], digest[16:]))
    return dx, dy


def decode_image(
    data: bytes, height: int, width: int, crop: str, dx: int = 0, dy: int = 0, originals: list | None = None
) -> np.ndarray:
    """Turn the bytes of an image file into upright RGB pixels of one size: (height, width, 3) uint8.

    Args: crop: see `load_images`; dx, dy: how far to the right and down "celeba-syn" moves it, in pixels;
    originals: a list, to which the height and the width of the image and the share that is kept are added.
    Raises: ValueError where "celeba" or "celeba-syn" does not fit, and what Pillow raises.
    """
    enough = (2 * max(height, width),) * 2  # for the best resampling
    image = read_rgb(data, None if crop.startswith("celeba") else enough)
    w, h = image.size
    if crop == "auto":
        crop = "celeba" if (w, h) == (178, 218) and height == width else "center"
    if crop in ("celeba", "celeba-syn"):
        if (w, h) != (178, 218):
            raise ValueError(f"is {h} x {w}, but --crop {crop} needs the aligned 218 x 178")
        left, top = (25 + dx, 50 + dy) if crop == "celeba-syn" else (25, 50)
        box = (left, top, left + 128, top + 128)
    elif crop == "squash":
        box = (0, 0, w, h)
    else:
        box_w, box_h = min(w, max(1, h * width // height)), min(h, max(1, w * height // width))
        left, top = (w - box_w) // 2, (h - box_h) // 2  # whole pixels: an image that fits is not blurred
        box = (left, top, left + box_w, top + box_h)
    if originals is not None:
        scale, kept = image.info["scale"], (box[2] - box[0]) * (box[3] - box[1]) / (w * h)
        originals.append((h * scale, w * scale, kept))
    # Lanczos averages where it reduces. The gap lets Pillow average large photographs cheaply first.
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0))


def read_rgb(data: bytes, enough: tuple[int, int] | None = None) -> Image.Image:
    """Read an image file as upright sRGB; a JPEG far larger than (width, height) enough comes smaller.

    How many times smaller is in its info["scale"].
    """
    if not data:
        raise ValueError("is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("is a Git LFS pointer and not the image; run git lfs pull")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    # Each scan goes over all pixels, however few bytes it has: a megabyte of them would take many minutes.
    scans, pixels = data.count(b"\xff\xda") if image.info.get("progressive") else 1, math.prod(image.size)
    if pixels > MAX_PIXELS or pixels * scans > MAX_SCANNED:
        raise ValueError(f"has {image.height} x {image.width} pixels, scanned {scans} times")
    if enough and image.width % 8 == image.height % 8 == 0:  # whole blocks, which shrink exactly
        image.draft(None, enough)
    with ONE_LARGE if math.prod(image.size) > LARGE else contextlib.nullcontext():
        image = to_srgb(image)
    image.info["scale"] = round(math.sqrt(pixels / math.prod(image.size)))
    return image


def to_srgb(image: Image.Image) -> Image.Image:
    """Upright RGB pixels, by the embedded colour profile if there is one; transparent ones over white."""
    profile = image.info.get("icc_profile")
    image.load()
    with contextlib.suppress(Exception):  # the pixels are good even where the EXIF block is not
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # more than 8 bits, which convert("RGB") would clip to white
        values = np.nan_to_num(np.asarray(image, np.float32))
        limits = (1, 255, 65535) if image.mode == "F" else (65535,)  # floats have no range by definition
        top = next((limit for limit in limits if values.max() <= limit), values.max())
        image = Image.fromarray(np.clip(values * (255 / top), 0, 255).round().astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = apply_profile(image, profile) or image.convert("RGB")
    if alpha is not None:
        image, rgb = Image.new("RGB", image.size, "white"), image
        image.paste(rgb, mask=alpha)
    return image


def apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """The image in sRGB; None where there is no profile, or one that is broken or of other colours."""
    with contextlib.suppress(KeyError, ValueError, OSError, ImageCms.PyCMSError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space]
        modes = {"RGB": ("RGB", "RGBA", "P", "PA"), "L": ("L", "LA"), "CMYK": ("CMYK",)}[mode]
        if image.mode in modes:
            image = image if image.mode == mode else image.convert(mode)
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")


# ---- Toys --------------------------------------------------------------------------------------------------

SKIN = ((255, 224, 196), (241, 194, 160), (224, 172, 125), (198, 134, 90), (141, 85, 54), (92, 56, 38))
HAIR = ((24, 20, 20), (59, 39, 28), (110, 70, 40), (165, 66, 32), (226, 190, 115), (176, 174, 172))
IRIS = ((60, 35, 20), (95, 55, 25), (120, 80, 35), (70, 120, 60), (45, 110, 185), (105, 130, 150))
FACE_DRAWS = 38  # random numbers that describe one face


def toy_faces(count: int, height: int, width: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Draw faces whose halves mirror each other, so that an eye sees whether patches made apart agree.

    Face i depends on the seed and i alone: it looks the same at every size and among any number of others.

    Args:
        count: number of images.
        height, width: their size in px; the face is drawn in the central square.
        seed: of the random numbers.

    Returns: an iterator over arrays (k, height, width, 3), uint8, of as many images as fit a core's cache.
    """
    side = min(height, width)
    y = (2 * np.arange(height, dtype=np.float32)[:, None] + 1 - height) / side  # -1 to 1 in the square
    x = (2 * np.arange(width, dtype=np.float32)[None, :] + 1 - width) / side
    draws = np.random.default_rng(seed).random((count, FACE_DRAWS), dtype=np.float32)
    k = max(1, 2**15 // (height * width))
    for start in range(0, count, k):
        yield _draw_faces(draws[start : start + k], y, x, 2 / side)


def _draw_faces(draws: np.ndarray, y: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """Paint one shape over another, from back to front, each from its signed distance (negative inside)."""
    numbers = iter(draws.T[:, :, None, None])  # each (k, 1, 1), to go with distances (k, height, width)

    def uniform(low: float, high: float) -> np.ndarray:
        return low + (high - low) * next(numbers)

    def mixture(colours: tuple) -> np.ndarray:  # (3, k, 1, 1), between two neighbours of a palette
        place = uniform(0, len(colours) - 1)
        channels = [np.interp(place, range(len(colours)), channel) for channel in zip(*colours)]
        return np.stack(channels).astype(np.float32)

    def any_colour() -> np.ndarray:
        return np.stack([uniform(50, 230) for _ in "rgb"])

    def paint(colour: np.ndarray, distance: np.ndarray, opacity: float = 1) -> None:
        cover = np.clip(0.5 - distance / pixel, 0, opacity)  # an edge is one pixel wide: antialiased
        for channel, value in zip(image, colour):
            channel += cover * (value - channel)

    def ellipse(y: np.ndarray, x: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        return (np.sqrt((y / height) ** 2 + (x / width) ** 2) - 1) * np.minimum(height, width)

    def only(which: np.ndarray, distance: np.ndarray) -> np.ndarray:
        return np.where(which, distance, 9)

    # Background: a soft gradient between two colours in any direction.
    angle, near, far = uniform(0, 2 * np.pi), any_colour(), any_colour()
    slope = np.clip(0.5 + 0.35 * (np.sin(angle) * y + np.cos(angle) * x), 0, 1)
    image = (near + slope * (far - near)).astype(np.float32)  # (3, k, height, width)

    size = uniform(0.92, 1.14)
    y, x, pixel = (y - uniform(-0.06, 0.08)) / size, (x - uniform(-0.1, 0.1)) / size, pixel / size
    half = np.abs(x)  # what is drawn with it is symmetric
    skin, hair, iris, cloth = mixture(SKIN), mixture(HAIR), mixture(IRIS), any_colour()
    shade, white = skin * 0.76, np.full((3, 1, 1, 1), 245, np.float32)
    style = uniform(0, 1)
    long, bald = (style > 0.4) & (style < 0.9), style > 0.9
    tall, wide, volume = uniform(0.60, 0.66), uniform(0.45, 0.52), uniform(0.06, 0.15)

    # Behind the head: hair, which falls straight down from the widest place, shoulders, neck and ears.
    end = np.where(long, uniform(0.2, 1.3), -0.1)
    mane = np.maximum(ellipse(np.minimum(y + 0.06, 0), x, tall + volume, wide + volume), y - end)
    paint(hair * 0.75, only(~bald, mane))
    paint(cloth, ellipse(np.minimum(y - 1.3, 0), x, 0.55, 0.95))
    paint(shade, np.maximum(half - 0.2, np.abs(y - 0.43 + 2 * half**2) - 0.43))
    paint(shade, ellipse(y - 0.06, half - wide, 0.13, 0.07))

    # The head, narrower towards the chin; hair above the hairline and, when long, beside the cheeks.
    jaw = 1 - uniform(0.1, 0.3) * np.clip(y / tall, 0, 1) ** 2
    paint(skin, ellipse(y, x / jaw, tall, wide))
    line = uniform(-0.42, -0.28) + uniform(-0.5, 0.9) * x**2 + uniform(-0.25, 0.25) * x
    paint(hair, only(~bald, np.maximum(mane, y - line)))
    paint(hair, only(long, np.maximum(np.maximum(mane, wide - 0.07 - half), -0.35 - y)))

    # Eyes: lid line, white, iris and pupil inside the white, and brows above.
    eye_y, eye_x = y - uniform(-0.05, 0.02), half - uniform(0.19, 0.23)
    eye = ellipse(eye_y, eye_x, uniform(0.065, 0.09), uniform(0.11, 0.135))
    paint(shade * 0.45, ellipse(eye_y + 0.025, eye_x, 0.085, 0.14))
    paint(white, eye)
    paint(iris, np.maximum(np.hypot(eye_y, eye_x) - 0.068, eye))
    paint(iris * 0.1, np.maximum(np.hypot(eye_y, eye_x) - 0.032, eye))
    brow = np.abs(eye_y + uniform(0.15, 0.19) - uniform(-0.2, 0.2) * eye_x) - uniform(0.02, 0.04)
    paint(np.minimum(hair * 0.6, skin * 0.6), np.maximum(brow, np.abs(eye_x) - 0.13))

    # Nose: two faint lines that widen to its tip.
    tip = uniform(0.17, 0.24)
    bridge = np.abs(half - 0.03 - 0.05 * np.clip(y / tip, 0, 1)) - 0.018
    paint(shade, np.maximum(bridge, np.abs(y - tip / 2) - tip / 2), 0.6)
    paint(shade * 0.9, ellipse(y - tip, x, 0.035, 0.085))

    # Mouth: lips along a parabola, from sad to smiling; some of the smiles show teeth.
    mouth_x, smile, open_ = uniform(0.15, 0.23), uniform(-1, 3), uniform(-0.06, 0.07)
    bow = np.abs(y - uniform(0.37, 0.42) + smile * (x**2 - mouth_x**2 / 2))
    taper = np.sqrt(np.maximum(1 - (x / mouth_x) ** 2, 0))
    gap = np.where(smile > 0.5, np.maximum(open_, 0), 0) * taper
    lips = 0.45 * skin + np.float32([85, 15, 25])[:, None, None, None]
    paint(lips, np.maximum(bow - gap - uniform(0.03, 0.045) * taper, half - mouth_x))
    paint(white, only(gap > 0, np.maximum(bow - gap, half - mouth_x)))
    return np.ascontiguousarray(np.clip(image + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 3, 0))


ZENITH = ((28, 30, 78), (62, 84, 160), (60, 130, 215), (88, 150, 205), (96, 88, 150), (54, 40, 96))
HORIZON = ((222, 120, 84), (236, 190, 150), (196, 222, 240), (214, 220, 214), (242, 168, 112), (206, 96, 98))
GRASS = ((46, 84, 40), (88, 120, 52), (142, 138, 70), (150, 106, 62), (196, 178, 128), (222, 224, 226))
LANDSCAPE_DRAWS = 85  # random numbers that describe one landscape


def toy_landscapes(count: int, height: int, width: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Draw panoramas whose left and right borders meet: sun near the middle, mountains right, sea left.

    They have directions, as photographs of one place would: a generator that ignores the azimuth is seen.
    Args, returns: as of toy_faces; rows are the height above the horizon, columns the azimuth, -π to π.
    """
    y = (2 * np.arange(height, dtype=np.float32)[:, None] + 1) / height - 1  # -1 to 1, downwards
    x = np.pi * ((2 * np.arange(width, dtype=np.float32)[None, :] + 1) / width - 1)  # an angle
    draws = np.random.default_rng(seed).random((count, LANDSCAPE_DRAWS), dtype=np.float32)
    k = max(1, 2**15 // (height * width))
    for start in range(0, count, k):
        yield _draw_landscapes(draws[start : start + k], y, x, 2 / height)


def _draw_landscapes(draws: np.ndarray, y: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """Paint from the sky to the ground, what depends on x by way of sines and cosines of its multiples."""
    numbers = iter(draws.T[:, :, None, None])  # each (k, 1, 1)

    def uniform(low: float, high: float) -> np.ndarray:
        return low + (high - low) * next(numbers)

    def mixture(colours: tuple, place: np.ndarray) -> np.ndarray:  # (3, k, 1, 1)
        channels = [np.interp(place, range(len(colours)), channel) for channel in zip(*colours)]
        return np.stack(channels).astype(np.float32)

    def paint(colour: np.ndarray, distance: np.ndarray, opacity: float = 1) -> None:
        cover = np.clip(0.5 - distance / pixel, 0, opacity)
        for channel, value in zip(image, colour):
            channel += cover * (value - channel)

    def waves(first: int, last: int) -> np.ndarray:  # (k, 1, width), within about -1 to 1
        return sum(np.sin(f * x + uniform(0, 2 * np.pi)) / (f - first + 2) for f in range(first, last))

    hour, season = uniform(0, 5), uniform(0, 5)
    zenith, haze, grass = mixture(ZENITH, hour), mixture(HORIZON, hour), mixture(GRASS, season)
    horizon = uniform(0.0, 0.2)
    right = (1 + np.cos(x - np.pi / 2 + uniform(-0.3, 0.3))) / 2  # 1 to the right, 0 to the left

    # Sky, brighter around the sun, which stands near the middle.
    sun_x, sun_y = uniform(-0.6, 0.6), horizon - uniform(0.35, 0.8)
    slope = np.clip((y + 1) / (horizon + 1), 0, 1) ** uniform(0.7, 1.6)
    image = zenith + slope * (haze - zenith) + 0 * x
    # Half of the height, 1, is 60°, or 1.05 in the units of x: with that the sun is round.
    turn = np.abs((x - sun_x + np.pi) % (2 * np.pi) - np.pi)
    away = np.hypot(turn / 1.05, y - sun_y)
    glow = 60 * np.exp(-4 * away)
    image = np.clip(image + glow * np.float32([1, 0.85, 0.5])[:, None, None, None], 0, 255)
    paint(np.float32([255, 246, 214])[:, None, None, None], away - uniform(0.09, 0.14))
    for _ in range(5):  # clouds, flat below
        far = (x - uniform(-np.pi, np.pi) + np.pi) % (2 * np.pi) - np.pi
        above, wide, high = horizon - uniform(0.35, 0.95) - y, uniform(0.15, 0.5), uniform(0.06, 0.15)
        paint(0.4 * haze + 150, np.maximum((np.hypot(far / wide, above / high) - 1) * high, -above), 0.8)

    # Two ridges all the way round, low over the sea and high to the right, the nearer one darker.
    for depth in (0.35, 0.7):
        rough = waves(2, 6) + 0.6 * np.abs(waves(5, 9))
        top = (uniform(0.05, 0.12) + right**2 * uniform(0.3, 0.6)) * (1.1 - depth / 2 + 0.35 * rough)
        rock = (1 - depth) * haze + depth * (0.5 * grass + np.float32([30, 34, 52])[:, None, None, None])
        top = np.maximum(top, 0.04)
        folds = np.sin(9 * x + 8 * y + 3 * rough)  # light and shade on the slopes
        paint(rock + (40 * (1 - depth) + 20 * folds) * right, horizon - top - y)

    # The sea below the horizon, with the sky in it, and the ground, whose shore comes near to the left.
    sea = 0.55 * haze + 0.45 * zenith - 25 + 18 * (y > horizon + 0.1)
    paint(sea, horizon - y)
    shore = horizon + 0.06 + (1 - right) ** 2 * uniform(0.25, 0.45) + 0.05 * waves(1, 5)
    paint(grass * 0.95, shore - y)
    near = shore + 0.25 + 0.1 * waves(3, 7)
    paint(grass * 0.7, near - y)
    # Furrows of a field, all towards where we stand. With the trees they give neighbouring columns the
    # differences that photographs have, beside which a seam can be judged.
    furrows = np.sin(24 * x) * np.clip(4 * (y - near), 0, 1)
    image = image * (1 + uniform(0.2, 0.4) * furrows)
    for _ in range(9):  # conifers on the ground
        far = np.abs((x - uniform(-np.pi, np.pi) + np.pi) % (2 * np.pi) - np.pi)
        foot, tall = shore + uniform(0.05, 0.3), uniform(0.2, 0.4)
        above = foot - y
        paint(0.35 * grass + 6, np.maximum(far - 0.35 * (tall - above), -above))
    return np.ascontiguousarray(np.clip(image + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 3, 0))


TOYS = {"toy:faces": toy_faces, "toy:landscapes": toy_landscapes}
