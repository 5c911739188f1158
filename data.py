"""Images for training: a folder or a zip of photographs, or faces that this file draws itself.

    from data import load_images
    images = load_images("photos.zip", 64, 64)  # (n, 64, 64, 3) uint8, mapped from a file, not in memory
    images = load_images("toy:faces", 32, 32)   # needs no photographs

Every source is decoded once, into one .npy file in the cache folder; later starts only map that file.
"""

import contextlib
import difflib
import errno
import hashlib
import io
import itertools
import mmap
import os
import pickle
import queue
import re
import secrets
import shutil
import stat
import subprocess
import sys
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks, and needs none: it deletes no file that is open
    fcntl = None

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Pillow goes by content, not by name. Only these readers, or a .jpg that is PostScript starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
CROPS = ("center", "celeba", "squash")
CACHE_VERSION = 1  # raise it when the same input gives other pixels than before
HEADER_BYTES = 128  # NumPy pads headers to multiples of 64, and ours always have 65 to 128 bytes
MAX_FILE_BYTES = 2**30  # nothing within Pillow's pixel limit comes near it; a zip bomb goes beyond


class UserError(ValueError):
    """A mistake that the user can mend; its message is the single line that they see."""


# ---------------------------------------------------------------------------------------------------------
# Loading: what training calls
# ---------------------------------------------------------------------------------------------------------


def load_images(
    source: str,
    height: int,
    width: int,
    *,
    crop: str = "center",
    cache: str | Path = "cache",
    workers: int = 0,
    toy_count: int = 4096,
) -> np.ndarray:
    """Map the images of a source, all cut to one size, decoding them first where no earlier call did.

    Args:
        source: a folder or a zip of photographs, or "toy:faces".
        height, width: size of every image in px.
        crop: "center", the largest centred rectangle of the wanted shape; "celeba", the paper's rows 50 to
            177 and columns 25 to 152 of an aligned 178 x 218 image; "squash", the whole image, out of shape.
        cache: folder of the decoded file.
        workers: number of decoding processes, 0 for one per core.
        toy_count: how many toy images to draw.

    Returns: np.memmap (n, height, width, 3), uint8, RGB, read-only, in the order of the sorted names.
    Raises: UserError.
    """
    if crop not in CROPS:
        raise UserError(f"--crop {crop} is unknown; choose one of {', '.join(CROPS)}")
    source, toy = os.path.expanduser(source), source.startswith("toy:")
    if toy and source not in TOYS:
        raise UserError(f"--data {source} is unknown; choose one of {', '.join(TOYS)}")
    elif toy:
        identity = f"{source} {toy_count}"
    elif os.path.isdir(source):
        lines = _list_folder(source)
        identity = "\n".join(lines)
    elif os.path.isfile(source):
        found = os.stat(source)  # not what is inside: a directory of 200,000 members takes seconds to read
        identity = f"{os.path.basename(source)} {found.st_size} {found.st_mtime_ns}"
    else:
        raise UserError(_missing(source))

    cut = f"{height}x{width}-{crop}"
    key = hashlib.sha256(os.fsencode(f"{CACHE_VERSION} {identity}")).hexdigest()[:16]
    title = re.sub(r"[^\w.-]", "_", os.path.basename(os.path.abspath(source)))[:40]
    path = Path(cache) / f"{title}-{cut}-{key}.npy"
    try:
        return _open_map(path)
    except (OSError, ValueError, EOFError):
        pass  # not there, or cut short by something else than this program: make it

    with contextlib.ExitStack() as stack:
        if toy:
            count = toy_count
            blocks = ((block, len(block)) for block in TOYS[source](toy_count, height, width))
        else:
            if os.path.isdir(source):
                names = [line.rsplit(" ", 2)[0] for line in lines]

                def read(name: str) -> bytes:
                    return Path(source, name).read_bytes()
            else:
                names, read = _open_zip(source, stack)
            if not names:
                raise UserError(f"--data {source} holds no image; looked for {' '.join(ENDINGS)} in any case")
            count, blocks = len(names), _decode_all(sorted(names), read, height, width, crop, workers)
        _store(path, stack.enter_context(contextlib.closing(blocks)), count, height, width)
    return _open_map(path)


def release_pages(images: np.ndarray) -> None:
    """Take the pages of a map out of this process's memory; does nothing to other arrays.

    To be called after every batch: it takes well under a millisecond and loses nothing, since nobody writes
    to them and they stay in the system's file cache. But Linux may map 2 MB around each byte that is touched,
    so that 128 random images of 64 px already count for 200 MB.
    """
    mapped = getattr(images, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _open_map(path: Path) -> np.ndarray:
    images = np.load(path, mmap_mode="r")
    if hasattr(mmap, "MADV_RANDOM"):
        images._mmap.madvise(mmap.MADV_RANDOM)  # batches jump about: reading ahead would be wasted
    return images


# ---------------------------------------------------------------------------------------------------------
# Finding: the names of the images, and what tells one set of images from another
# ---------------------------------------------------------------------------------------------------------


def _list_folder(root: str) -> list[str]:
    """Return "NAME SIZE MTIME" of every image below a folder, sorted: what changes when an image does."""
    lines, folders, seen = [], [""], set()
    while folders:
        folder, below = folders.pop(), []
        where = os.path.join(root, folder)
        if os.path.realpath(where) in seen:  # a link may lead back up
            continue
        seen.add(os.path.realpath(where))
        try:
            with os.scandir(where) as entries:
                for entry in entries:  # with 200,000 images, every start waits for what stands here
                    name = entry.name
                    if name[0] == "." or name == "__MACOSX":
                        continue
                    is_image = name.lower().endswith(ENDINGS)
                    try:
                        if is_image:
                            found = entry.stat()
                            if stat.S_ISREG(found.st_mode):  # reading a named pipe would never end
                                lines.append(f"{folder}{name} {found.st_size} {found.st_mtime_ns}")
                                continue
                        if entry.is_dir():
                            below.append(f"{folder}{name}/")
                    except OSError:
                        if is_image:  # a dead link: will be counted as skipped
                            lines.append(f"{folder}{name} -1 -1")
        except OSError as error:
            raise UserError(f"--data {where} can't be listed: {error.strerror}; mend or remove it") from error
        folders += sorted(below, reverse=True)
    return sorted(lines)


def _open_zip(source: str, stack: contextlib.ExitStack) -> tuple[list[str], Callable[[str], bytes]]:
    """Return the names of all images in a zip, and a function that reads one of them in place."""
    try:
        # ZipFile counts the readers of a file that it opened itself, without a lock, and may close it
        # under one of several threads; a file handed to it stays open.
        archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(open(source, "rb"))))
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--data {source} is no zip that can be read ({error}); give a folder or a zip"
        ) from error
    members = {
        info.filename: info  # where two have one name, the later replaces the earlier
        for info in archive.infolist()
        if info.filename.lower().endswith(ENDINGS)
        and not re.search(r"(^|/)(\.[^/.]|__MACOSX/)", info.filename)
    }

    def read(name: str) -> bytes:
        if members[name].file_size > MAX_FILE_BYTES:
            raise ValueError(f"unpacks to {members[name].file_size:,} bytes; {MAX_FILE_BYTES:,} are allowed")
        return archive.read(members[name])

    return list(members), read


def _missing(source: str) -> str:
    folder, name = os.path.split(os.path.abspath(source))
    near = difflib.get_close_matches(name, os.listdir(folder) if os.path.isdir(folder) else (), n=1)
    hint = f"is {os.path.join(folder, near[0])} meant? Give" if near else "give"
    return f"--data {source} does not exist; {hint} a folder or a zip of images, or {' or '.join(TOYS)}"


# ---------------------------------------------------------------------------------------------------------
# Decoding: the bytes of one image file -> upright RGB -> crop -> resize, in several processes
# ---------------------------------------------------------------------------------------------------------


def decode_image(data: bytes, height: int, width: int, crop: str) -> np.ndarray:
    """Turn the bytes of an image file into upright RGB pixels of one size.

    Args:
        data: the whole file.
        height, width: size of the result in px.
        crop: see load_images.

    Returns: (height, width, 3), uint8.
    Raises: ValueError where "celeba" does not fit, and whatever Pillow raises for files that it can't read.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.load()
        with contextlib.suppress(Exception):  # pixels are good even where the EXIF block is not
            image = ImageOps.exif_transpose(image)
        image = _to_rgb(image)
    w, h = image.size
    if crop == "celeba":
        if (w, h) != (178, 218):
            raise ValueError(f"is {w} x {h}, but --crop celeba needs the aligned 178 x 218")
        box = (25, 50, 25 + 128, 50 + 128)
    elif crop == "squash":
        box = (0, 0, w, h)
    else:
        box_w, box_h = min(w, max(1, h * width // height)), min(h, max(1, w * height // width))
        left, top = (w - box_w) // 2, (h - box_h) // 2  # whole pixels: an image that fits is not blurred
        box = (left, top, left + box_w, top + box_h)
    # Lanczos has its antialiasing built in; the gap lets it average large photographs down cheaply first.
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":
        # More than 8 bits, which convert() would clip to white. Integers range to 65,535 wherever they fit,
        # as in every 16-bit PNG; floats have no range by definition, so the smallest usual one that fits.
        values = np.nan_to_num(np.asarray(image, np.float32))
        limits = (1, 255, 65535) if image.mode == "F" else (65535,)
        top = next((limit for limit in limits if values.max() <= limit), values.max())
        image = Image.fromarray(np.clip(values * (255 / top), 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _serve() -> None:
    """Decode what comes down stdin until it closes: the whole life of a decoding process."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    warnings.simplefilter("ignore")  # 200,000 images have much to complain of; errors come back as reasons
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    pixels, reasons = [], []
    # The parent's end, however violent, closes the pipes; then there is nobody left to tell.
    with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
        height, width, crop = pickle.load(stdin)
        while True:
            data = pickle.load(stdin)
            if data is None:  # the end of a chunk
                pickle.dump((b"".join(pixels), reasons), stdout)
                stdout.flush()
                pixels, reasons = [], []
                continue
            reason = ""
            try:
                pixels.append(decode_image(data, height, width, crop).tobytes())
            except UnidentifiedImageError:  # its text has an address in memory
                reason = "is no image that Pillow can read" if data else "is empty"
            except Exception as error:  # broken files raise OSError, SyntaxError, struct.error, IndexError...
                reason = _reason(error)
            reasons.append(reason)
    os._exit(0)  # no flushing into a closed pipe


def _decode_all(
    names: list[str], read: Callable[[str], bytes], height: int, width: int, crop: str, workers: int
) -> Iterator[tuple[bytes, int]]:
    """Yield the pixels of the images in the order of their names, each block with the count it stands for.

    One thread per decoding process reads files and sends them down a pipe, which holds it back when it is
    ahead, so that memory stays bounded. They are plain new processes and not multiprocessing's: forking
    a program with threads (torch has some) may deadlock, and spawn and forkserver import its main file, and
    torch with it, in each. When this process is killed their pipes close, and they end.
    """
    per_chunk = max(1, min(64, 2**21 // (height * width * 3)))
    chunks = iter([names[i : i + per_chunk] for i in range(0, len(names), per_chunk)])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, -(-len(names) // per_chunk))
    code = f"import sys; sys.path.insert(0, '.'); from {Path(__file__).stem} import _serve; _serve()"
    idle, skipped = queue.SimpleQueue(), []

    def decode(chunk: list[str]) -> tuple[bytes, int, list[str]]:
        process, unread = idle.get(), {}
        try:
            for name in chunk:
                try:
                    data = read(name)
                except Exception as error:  # encrypted, bad checksum, unknown compression, no permission...
                    data, unread[name] = b"", _reason(error)
                pickle.dump(data, process.stdin)
            pickle.dump(None, process.stdin)
            process.stdin.flush()
            pixels, reasons = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            text = f"one of --workers {workers} died near {chunk[0]}; if memory is short, try fewer"
            raise UserError(text) from error
        finally:
            idle.put(process)
        bad = [f"{name!r}: {unread.get(name, reason)}" for name, reason in zip(chunk, reasons) if reason]
        return pixels, len(chunk), bad

    pool, processes = ThreadPoolExecutor(workers), []
    try:
        for _ in range(workers):
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=Path(__file__).resolve().parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the parent alone; next line: the same on Windows
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
            processes.append(process)
            pickle.dump((height, width, crop), process.stdin)
            idle.put(process)
        pending = deque(pool.submit(decode, chunk) for chunk in itertools.islice(chunks, 2 * workers))
        while pending:
            pixels, count, bad = pending.popleft().result()
            pending.extend(pool.submit(decode, chunk) for chunk in itertools.islice(chunks, 1))
            skipped += bad
            yield pixels, count
    finally:
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)
        for process in processes:
            with contextlib.suppress(OSError), process:
                pass  # closes its pipes and waits for it
    if len(skipped) == len(names):
        raise UserError(f"--data: none of the {len(names):,} images can be used; the first: {skipped[0]}")
    if skipped:
        first = "\n  ".join(skipped[:5])
        print(f"skipped {len(skipped):,} of {len(names):,} images:\n  {first}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------
# The cache file
# ---------------------------------------------------------------------------------------------------------


def _store(path: Path, blocks: Iterator[tuple[bytes, int]], count: int, height: int, width: int) -> None:
    """Write images to a .npy file that appears under its name only when it is whole.

    Args:
        path: where to.
        blocks: pixels, and the number of images of the source that they stand for.
        count: number of images of the source, more than there are in blocks where some are skipped.
        height, width: size of each image in px.
    """
    need = HEADER_BYTES + count * height * width * 3
    # A name of its own: two processes may decode the same at once, and the later rename wins.
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.tmp")
    tty, done, shown = sys.stderr.isatty(), 0, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        if shutil.disk_usage(path.parent).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(temporary, "xb") as file:
            if fcntl:
                with contextlib.suppress(OSError):  # not every network file system has locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            file.write(bytes(HEADER_BYTES))
            file.flush()
            for block, images in blocks:
                file.write(block)
                done += images
                if done == count or done * (100 if tty else 4) // count > shown:
                    shown = done * (100 if tty else 4) // count
                    start, end = ("\r", "\n" if done == count else "") if tty else ("", "\n")
                    line = f"{start}{done:,} of {count:,} images ready{end}"
                    print(line, end="", file=sys.stderr, flush=True)
            # The header comes last, because only now the number of good images is known.
            shape = ((file.tell() - HEADER_BYTES) // (height * width * 3), height, width, 3)
            header = io.BytesIO()
            fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(header, fields)
            assert len(header.getvalue()) == HEADER_BYTES
            file.seek(0)
            file.write(header.getvalue())
            file.flush()
            os.fsync(file.fileno())
            if not fcntl:
                file.close()  # Windows renames no open file; elsewhere the lock must last until the rename
            os.replace(temporary, path)
    except OSError as error:
        why, megabytes = error.strerror or error, f"{need / 1e6:,.1f} MB"
        raise UserError(f"--cache {path.parent}: {why}; name a folder with room for {megabytes}") from error
    finally:
        with contextlib.suppress(OSError):  # as a rule it is gone by now, renamed
            temporary.unlink()


def _sweep(path: Path) -> None:
    """Delete what killed decodes of the same file left behind."""
    for old in path.parent.glob(f"{path.stem}.*.tmp"):
        # OSError: somebody is still writing it. Who finds it empty may have come just before its lock.
        with contextlib.suppress(OSError), open(old, "r+b") as file:
            if os.fstat(file.fileno()).st_size == 0:
                continue
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.close()
            old.unlink()


# ---------------------------------------------------------------------------------------------------------
# Toys
# ---------------------------------------------------------------------------------------------------------

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


TOYS = {"toy:faces": toy_faces}
