"""Images for training: a folder or a zip of photographs, or pictures that this file draws itself.

    from data import load_images
    images = load_images("photos.zip", 64, 64)  # (n, 64, 64, 3) uint8, mapped from a file, not in memory
    images = load_images("toy:faces", 32, 32)   # needs no photographs

Every source is decoded once, into one .npy file in the cache folder; later starts only map that file.

    python data.py panorama cubemaps.zip panoramas  # cube maps and 2:1 images -> images of a cylinder
"""

import argparse
import contextlib
import difflib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import pickle
import queue
import re
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks, and needs none: it deletes no file that is open
    fcntl = None

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Pillow goes by content, not by name. Only these readers, or a .jpg that is PostScript starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
CROPS = ("center", "celeba", "squash", "celeba-syn")
CACHE_VERSION = 1  # raise it when the same input gives other pixels than before
HEADER_BYTES = 128  # NumPy pads headers to multiples of 64, and ours always have 65 to 128 bytes
MAX_FILE_BYTES = 2**29  # three values of 16 bits for each of Pillow's most pixels; a zip bomb goes beyond
MOST_SCANNED = 2**32  # pixels times scans of a progressive JPEG; ten scans are usual


class UserError(ValueError):
    """A mistake that the user can mend; its message is the single line that they see."""

    def __str__(self) -> str:
        # It may quote a name or a file of a stranger's, with ends of lines and commands to the terminal.
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


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
    panorama: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """Map the images of a source, all cut to one size, decoding them first where no earlier call did.

    Args:
        source: a folder or a zip of photographs, or one of TOYS.
        height, width: size of every image in px.
        crop: "center", the largest centred rectangle of the wanted shape; "celeba", the paper's rows 50 to
            177 and columns 25 to 152 of an aligned 178 x 218 image; "squash", the whole image, out of shape;
            "celeba-syn", as "celeba", but moved away by what displacement gives for each image.
        cache: folder of the decoded file.
        workers: number of decoding processes, 0 for one per core.
        toy_count: how many toy images to draw.
        panorama: whether panoramas are wanted, so that cube maps would be a mistake.
        seed: of the displacements of "celeba-syn"; the other crops leave nothing to chance.

    Returns: np.memmap (n, height, width, 3), uint8, RGB, read-only, in the order of the sorted names.
    Raises: UserError.
    """
    if crop not in CROPS:
        raise UserError(f"--crop {crop} is unknown; choose one of {', '.join(CROPS)}")
    source, toy = os.path.expanduser(source), source.startswith("toy:")
    if toy and source not in TOYS:
        raise UserError(f"--data {source} is unknown; choose one of {', '.join(TOYS)}")
    elif toy and crop != "center":
        why = f"--crop {crop} is for photographs, and --data {source} is drawn in the size that is wanted"
        raise UserError(f"{why}; leave out --crop, or give photographs")
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

    cut = f"{height}x{width}-{crop}" + (f"-{seed}" if crop == "celeba-syn" else "")
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
            folder = os.path.isdir(source)
            names, read = _open_folder(source, lines) if folder else _open_zip(source, stack)
            if panorama and any(len(files) == 6 for _, files, _ in _places(sorted(names), "").values()):
                hint = f"make panoramas of them by: python data.py panorama {shlex.quote(source)} panoramas"
                raise UserError(f"--data {source} holds faces of cube maps; {hint}")
            if not names:
                raise UserError(f"--data {source} holds no image; looked for {' '.join(ENDINGS)} in any case")
            count, how = len(names), (height, width, crop, seed)
            blocks = _decode_all(sorted(names), read, how, workers)
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


def _open_folder(root: str, lines: list[str]) -> tuple[list[str], Callable[[str], bytes]]:
    """Return the names in the lines of `_list_folder`, and a function that reads one of them."""
    return [line.rsplit(" ", 2)[0] for line in lines], lambda name: read_file(Path(root, name))


def _open_zip(source: str, stack: contextlib.ExitStack) -> tuple[list[str], Callable[[str], bytes]]:
    """Return the names of all images in a zip, and a function that reads one of them in place."""
    try:
        # ZipFile counts the readers of a file that it opened itself, without a lock, and may close it
        # under one of several threads; a file handed to it stays open.
        archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(open(source, "rb"))))
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        found = f"--data {source} is no zip that can be read ({error})"
        raise UserError(f"{found}; give a folder or a zip") from error
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


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises: OSError, or ValueError for one that cannot be an image."""
    if path.stat().st_size > MAX_FILE_BYTES:  # of which a sparse file takes none of the disk
        raise ValueError(f"has {path.stat().st_size:,} bytes; {MAX_FILE_BYTES:,} are allowed")
    return path.read_bytes()


def _missing(source: str) -> str:
    folder, name = os.path.split(os.path.abspath(source))
    near = difflib.get_close_matches(name, os.listdir(folder) if os.path.isdir(folder) else (), n=1)
    hint = f"is {os.path.join(folder, near[0])} meant? Give" if near else "give"
    return f"--data {source} does not exist; {hint} a folder or a zip of images, or {' or '.join(TOYS)}"


# ---------------------------------------------------------------------------------------------------------
# Decoding: the bytes of one image file -> upright RGB -> crop -> resize, in several processes
# ---------------------------------------------------------------------------------------------------------


def displacement(seed: int, name: str) -> tuple[int, int]:
    """How far CelebA-syn moves the cut out of an image: dx and dy, px, each uniform on -25, -24 … 25.

    It follows from the seed and the image's name below its folder or in its zip, and from nothing else: what
    other images there are, their order and the number of workers change nothing.
    Source: section 3.8, which says nothing of whole pixels; a cut between them would blur.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest()
    dx, dy = (int.from_bytes(part, "big") % 51 - 25 for part in (digest[:16], digest[16:]))
    return dx, dy


def decode_displaced(file: tuple[str, bytes], height: int, width: int, seed: int) -> np.ndarray:
    """As decode_image, of the name and bytes of an image of CelebA-syn."""
    name, data = file
    return decode_image(data, height, width, "celeba-syn", *displacement(seed, name))


def decode_image(data: bytes, height: int, width: int, crop: str, dx: int = 0, dy: int = 0) -> np.ndarray:
    """Turn the bytes of an image file into upright RGB pixels of one size.

    Args:
        data: the whole file.
        height, width: size of the result in px.
        crop: see load_images.
        dx, dy: how far to the right and down the cut of "celeba-syn" is moved, in px.

    Returns: (height, width, 3), uint8.
    Raises: ValueError where "celeba" or "celeba-syn" does not fit, and whatever Pillow raises for files that
        it can't read.
    """
    image = read_rgb(data)
    w, h = image.size
    if crop in ("celeba", "celeba-syn"):
        if (w, h) != (178, 218):
            raise ValueError(f"is {w} x {h}, but --crop {crop} needs the aligned 178 x 218")
        left, top = 25 + dx, 50 + dy
        box = (left, top, left + 128, top + 128)
    elif crop == "squash":
        box = (0, 0, w, h)
    else:
        box_w, box_h = min(w, max(1, h * width // height)), min(h, max(1, w * height // width))
        left, top = (w - box_w) // 2, (h - box_h) // 2  # whole pixels: an image that fits is not blurred
        box = (left, top, left + box_w, top + box_h)
    # Lanczos has its antialiasing built in; the gap lets it average large photographs down cheaply first.
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0))


def read_rgb(data: bytes, enough: tuple[int, int] | None = None) -> Image.Image:
    """Read an image file as upright RGB; a JPEG far larger than (width, height) enough comes smaller."""
    if not data:
        raise ValueError("is empty")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    # Each scan goes over all pixels, however few bytes it has: a megabyte of them would take many minutes.
    scans = data.count(b"\xff\xda") if image.info.get("progressive") else 1
    if image.width * image.height * scans > MOST_SCANNED:
        raise ValueError(f"has {scans} scans of {image.width} x {image.height} pixels")
    if enough and image.width % 8 == image.height % 8 == 0:  # whole blocks, which shrink exactly
        image.draft(None, enough)
    image.load()
    with contextlib.suppress(Exception):  # pixels are good even where the EXIF block is not
        image = ImageOps.exif_transpose(image)  # a copy: with the original its decoder goes, a GB of WebP's
    return _to_rgb(image)


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


def reason_of(error: Exception) -> str:
    """Why an image could not be read, as one line for its reader."""
    if isinstance(error, UnidentifiedImageError):  # its text has an address in memory
        return "is no image that Pillow can read"
    return " ".join(str(error).split()) or type(error).__name__


def _serve() -> None:
    """Do the work that comes down stdin until it closes: the whole life of a decoding process."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    warnings.simplefilter("ignore")  # 200,000 images have much to complain of; errors come back as reasons
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    results, reasons = [], []
    # The parent's end, however violent, closes the pipes; then there is nobody left to tell.
    with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
        work, options = pickle.load(stdin)
        while True:
            data = pickle.load(stdin)
            if data is None:  # the end of a chunk
                pickle.dump((b"".join(results), reasons), stdout)
                stdout.flush()
                results, reasons = [], []
                continue
            reason = ""
            try:
                results.append(bytes(globals()[work](data, *options)))
            except Exception as error:  # broken files raise OSError, SyntaxError, struct.error, IndexError...
                reason = reason_of(error)
            reasons.append(reason)
    os._exit(0)  # no flushing into a closed pipe


def _decode_all(
    names: list[str], read: Callable[[str], bytes], how: tuple[int, int, str, int], workers: int
) -> Iterator[tuple[bytes, int]]:
    """Yield the pixels of the images in the order of their names, each block with the count it stands for.

    Args: how: height, width, crop and seed, see load_images.
    """
    height, width, crop, seed = how
    per_chunk, skipped = max(1, min(64, 2**21 // (height * width * 3))), []
    if crop == "celeba-syn":  # the only one for which a name means something
        work = "decode_displaced", (height, width, seed), names, lambda name: (name, read(name))
    else:
        work = "decode_image", (height, width, crop), names, read
    blocks = _in_processes(*work, per_chunk, workers)
    with contextlib.closing(blocks):
        for pixels, count, bad in blocks:
            skipped += bad
            yield pixels, count
    if len(skipped) == len(names):
        raise UserError(f"--data: none of the {len(names):,} images can be used; the first: {skipped[0]}")
    _name_skipped(skipped, len(names), "images")


def _name_skipped(skipped: list[str], count: int, what: str) -> None:
    if skipped:
        first = "\n  ".join(skipped[:5])
        print(f"skipped {len(skipped):,} of {count:,} {what}:\n  {first}", file=sys.stderr)


def _in_processes(
    work: str, options: tuple, names: list[str], read: Callable[[str], object], per_chunk: int, workers: int
) -> Iterator[tuple[bytes, int, list[str]]]:
    """Yield what a function of this file makes of what read gives for the names, in their order.

    Args:
        work: the name of the function, called as work(read(name), *options); it returns bytes, or an array.
        per_chunk: number of names that are worked on at a time.

    Returns: for each chunk, its results joined, its number of names, and "NAME: REASON" of those that failed.

    One thread per decoding process reads files and sends them down a pipe, which holds it back when it is
    ahead, so that memory stays bounded. They are plain new processes and not multiprocessing's: forking
    a program with threads (torch has some) may deadlock, and spawn and forkserver import its main file, and
    torch with it, in each. When this process is killed their pipes close, and they end.
    """
    chunks = iter([names[i : i + per_chunk] for i in range(0, len(names), per_chunk)])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, -(-len(names) // per_chunk))
    code = f"import sys; sys.path.insert(0, '.'); from {Path(__file__).stem} import _serve; _serve()"
    idle = queue.SimpleQueue()

    def serve(chunk: list[str]) -> tuple[bytes, int, list[str]]:
        process, unread = idle.get(), {}
        try:
            for name in chunk:
                try:
                    data = read(name)
                except Exception as error:  # encrypted, bad checksum, unknown compression, no permission...
                    data, unread[name] = b"", reason_of(error)
                pickle.dump(data, process.stdin)
            pickle.dump(None, process.stdin)
            process.stdin.flush()
            results, reasons = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            text = f"one of --workers {workers} died near {chunk[0]}; if memory is short, try fewer"
            raise UserError(text) from error
        finally:
            idle.put(process)
        bad = [f"{name!r}: {unread.get(name, reason)}" for name, reason in zip(chunk, reasons) if reason]
        return results, len(chunk), bad

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
            pickle.dump((work, options), process.stdin)
            idle.put(process)
        pending = deque(pool.submit(serve, chunk) for chunk in itertools.islice(chunks, 2 * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(serve, chunk) for chunk in itertools.islice(chunks, 1))
            yield result
    finally:
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)
        for process in processes:
            with contextlib.suppress(OSError), process:
                pass  # closes its pipes and waits for it


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
    done = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent, "*-" + 16 * "[0-9a-f]")  # of other photographs too, for these files are large
        if shutil.disk_usage(path.parent).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _whole(path) as file:
            file.write(bytes(HEADER_BYTES))
            file.flush()
            for block, images in blocks:
                file.write(block)
                done += images
                _progress(done, images, count, "images")
            # The header comes last, because only now the number of good images is known.
            shape = ((file.tell() - HEADER_BYTES) // (height * width * 3), height, width, 3)
            header = io.BytesIO()
            fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(header, fields)
            assert len(header.getvalue()) == HEADER_BYTES
            file.seek(0)
            file.write(header.getvalue())
    except OSError as error:
        why, megabytes = error.strerror or error, f"{need / 1e6:,.1f} MB"
        raise UserError(f"--cache {path.parent}: {why}; name a folder with room for {megabytes}") from error


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name when the block has ended well; else nothing is left of it."""
    # A name of its own: two processes may make the same at once, and the later rename wins.
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if fcntl:
                with contextlib.suppress(OSError):  # not every network file system has locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not fcntl:
                file.close()  # Windows renames no open file; elsewhere the lock must last until the rename
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # as a rule it is gone by now, renamed
            temporary.unlink()


def _progress(done: int, step: int, count: int, what: str) -> None:
    """Tell on stderr, a few times in all, how many are done, of which a step just now."""
    tty = sys.stderr.isatty()
    times = 100 if tty else 4
    if done == count or done * times // count > (done - step) * times // count:
        start, end = ("\r", "\n" if done == count else "") if tty else ("", "\n")
        print(f"{start}{done:,} of {count:,} {what} ready{end}", end="", file=sys.stderr, flush=True)


def _sweep(folder: Path, stem: str) -> None:
    """Delete what killed processes left behind of files whose names, without ending, match a pattern."""
    for old in folder.glob(f"{stem}.{8 * '[0-9a-f]'}.tmp"):
        # OSError: somebody is still writing it. Who finds it empty may have come just before its lock.
        with contextlib.suppress(OSError), open(old, "r+b") as file:
            found = os.fstat(file.fileno())
            if found.st_size == 0 and time.time() - found.st_mtime < 60:
                continue
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.close()
            old.unlink()


# ---------------------------------------------------------------------------------------------------------
# Panoramas: cube maps and equirectangular images -> images of a cylinder
# ---------------------------------------------------------------------------------------------------------

# Right, up and out of each face of a cube, in x (right), y (up), z (front). Seen from inside, the point a to
# the right and b up in [-1, 1] of a face lies in the direction a · right + b · up + out.
FACES = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],  # front
        [[0, 0, -1], [0, 1, 0], [1, 0, 0]],  # right
        [[-1, 0, 0], [0, 1, 0], [0, 0, -1]],  # back
        [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],  # left
        [[1, 0, 0], [0, 0, -1], [0, 1, 0]],  # up
        [[1, 0, 0], [0, 0, 1], [0, -1, 0]],  # down
    ]
)
FACE_NAMES = (  # in the order of FACES; the first are Matterport's
    ("skybox1_sami", "skybox2_sami", "skybox3_sami", "skybox4_sami", "skybox0_sami", "skybox5_sami"),
    ("pz", "px", "nz", "nx", "py", "ny"),
    ("posz", "posx", "negz", "negx", "posy", "negy"),
    ("f", "r", "b", "l", "u", "d"),
)


def make_panoramas(source: str, folder: str, view: tuple[int, int, str, float], workers: int = 0) -> str:
    """Make an image of the cylinder around each place of which a source has a cube map or a 2:1 image.

    Args:
        source: a folder or a zip.
        folder: where the images go, as PNG; those that it has already are not made again.
        view: see draw_panorama.
        workers: number of processes, 0 for one per core.

    Returns: a line that says what was done. Raises: UserError.
    """
    if not folder:
        raise UserError("DST is empty; name a folder")
    source, target = os.path.expanduser(source), Path(os.path.expanduser(folder))
    origin, goal = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if origin == goal or origin in goal.parents or (goal in origin.parents and origin.is_dir()):
        raise UserError(f"DST {folder} and SRC {source} are one, or one is in the other; name another DST")
    with contextlib.ExitStack() as stack:
        if os.path.isdir(source):
            names, fetch = _open_folder(source, _list_folder(source))
        elif os.path.isfile(source):
            names, fetch = _open_zip(source, stack)
        else:
            raise UserError(f"SRC {source} does not exist; give a folder or a zip of images")
        places = _places(sorted(names), origin.stem)

        def read(label: str) -> dict[str, bytes]:
            _, files, fault = places[label]
            if fault:
                raise ValueError(fault)
            return {name: fetch(name) for name in files}

        settings = json.dumps(dict(zip(("rows", "columns", "projection", "latitude"), view)))
        record, made, skipped = target / "panorama.json", 0, []
        try:
            before = " ".join(record.read_text(errors="replace").split()) if record.exists() else ""
            if before not in ("", settings):
                raise UserError(f"DST {folder} has panoramas of other settings, {before}; name another")
            if not before and target.is_dir() and _list_folder(str(target)):
                raise UserError(f"DST {folder} holds images from elsewhere; name a new or empty folder")
            _sweep(target, "*")
            todo = [label for label in places if not (target / places[label][0]).exists()]
            results = _in_processes("draw_panorama", view, todo, read, 1, workers)
            stack.enter_context(contextlib.closing(results))
            for done, (label, (png, _, bad)) in enumerate(zip(todo, results), 1):
                if png:
                    if not before and not made:
                        target.mkdir(parents=True, exist_ok=True)
                        with _whole(record) as file:
                            file.write(settings.encode())
                    with _whole(target / places[label][0]) as file:
                        file.write(png)
                    made += 1
                skipped += bad
                _progress(done, 1, len(todo), "panoramas")
        except OSError as error:
            raise UserError(f"DST {folder}: {error.strerror or error}; name another folder") from error
    if len(skipped) == len(places):
        sought = ", ".join(" ".join(names) for names in FACE_NAMES)
        first = f" (first of {len(skipped)}: {skipped[0]})" if skipped else ""
        raise UserError(f"SRC {source} holds no panorama{first}; looked for 2:1 images and faces: {sought}")
    _name_skipped(skipped, len(places), "panoramas")
    there = len(places) - len(todo)
    return f"{made:,} panoramas made, {there:,} were there already, {len(skipped):,} skipped, in {target}"


def _places(names: list[str], title: str) -> dict[str, tuple[str, list[str], str]]:
    """Sort the names of images into places to make a panorama of.

    Args:
        names: sorted.
        title: for a cube map whose faces have no name but "f", "r"...

    Returns: for each place, by what to call it: the name of its panorama, its images (six in the order of
    FACES, or one), and what is wrong with them, if anything.
    """
    pattern = re.compile(rf"(|.*[/\\_. -])({'|'.join(itertools.chain(*FACE_NAMES))})\.\w+", re.I | re.S)
    cubes, found = {}, {name: (os.path.splitext(name)[0], [name], "") for name in names}
    for name in names:
        if match := pattern.fullmatch(name):
            family = next(family for family in FACE_NAMES if match[2].lower() in family)
            cubes.setdefault((match[1], family), []).append((family.index(match[2].lower()), name))
    for (prefix, family), faces in cubes.items():
        lacks = [face for i, face in enumerate(family) if i not in dict(faces)]
        if len(lacks) < 3:  # else a stereo pair called l and r, or chance: each is seen by itself
            files = [name for _, name in sorted(faces)]
            fault = f"lacks {' '.join(lacks)}" if lacks else "has two of one face" * (len(files) > 6)
            for name in files:
                del found[name]
            found[f"{prefix}[{' '.join(family)}]"] = prefix, files, fault

    def clean(stem: str) -> str:
        """Join folders by "+", which itself is quoted, as is all that might not go into a name."""
        stem = stem.replace("\\", "/").strip("/_. -") or title
        stem = re.sub(r"[^\w ./-]", lambda match: quote(match[0], errors="surrogateescape"), stem)
        return stem.replace("/", "+")

    counts, places = Counter(clean(stem).casefold() for stem, _, _ in found.values()), {}
    for label, (stem, files, fault) in sorted(found.items()):
        stem = clean(stem)
        if counts[stem.casefold()] > 1 or len(os.fsencode(stem)) > 200:
            stem = f"{stem[:50]}-{hashlib.sha256(os.fsencode(label)).hexdigest()[:8]}"
        places[label] = f"{stem}.png", files, fault
    return places


def draw_panorama(
    files: dict[str, bytes], rows: int, columns: int, projection: str, latitude: float
) -> bytes:
    """Draw the cylinder around the six faces of a cube map, or around one equirectangular image.

    Args:
        files: name and content of each image, the faces in the order of FACES.
        rows, columns: size of the panorama in px; columns are evenly spaced in longitude, from -π to π.
        projection: "equirectangular", rows evenly spaced in latitude v, or "mercator", in ln tan(π/4 + v/2).
        latitude: of the upper border in degrees; the lower one is as far below the horizon.

    Returns: a PNG. Raises: ValueError, which names the image, where they do not make a panorama.
    """
    view, cube = (rows, columns, projection, latitude), len(files) == 6
    enough, down, right, step = _samples(cube, view)
    images, sizes = [], []
    for name, content in files.items():
        try:
            image = read_rgb(content, (enough if cube else 2 * enough, enough))
            if image.height > enough and image.width == image.height * (1 if cube else 2):
                # Now, or six large ones would be in memory.
                size = (enough if cube else 2 * enough, enough)
                image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            images.append(image)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                sizes.append(image.size)  # as it was before read_rgb made it smaller
        except Exception as error:
            raise ValueError(f"{name!r}: {reason_of(error)}" if cube else reason_of(error)) from error
    usual = max(sizes, key=sizes.count)
    for name, (w, h), image in zip(files, sizes, images):
        if cube and ((w, h) != usual or w != h):
            raise ValueError(f"{name!r} is {w} x {h}; the faces must be squares of one size")
        if not cube and image.width != 2 * image.height:
            raise ValueError(f"is {w} x {h}: neither 2:1 nor one of six faces")

    # Sources have a border of one pixel, so that between two faces, or ends, it is the other's pixels that
    # are interpolated. Corners lie between borders, hence the second round.
    side = min(enough, *(image.height for image in images))
    size = (side if cube else 2 * side, side)
    images = [np.asarray(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)) for image in images]
    pixels = np.pad(np.stack(images).transpose(3, 0, 1, 2), ((0, 0), (0, 0), (1, 1), (1, 1))).reshape(3, -1)
    border, *taps = _border(cube, side)
    for _ in range(2):
        pixels[:, border] = _interpolate(pixels, *taps) + 0.5

    result = np.empty((rows, columns, 3), np.uint8)
    for start in range(0, rows, step):
        samples = _interpolate(pixels, *_band(cube, side, view, start)).reshape(3, -1, down, columns, right)
        total = sum(samples[:, :, y, :, x] for y in range(down) for x in range(right))
        result[start : start + step] = (total / (down * right) + 0.5).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(result).save(file, "PNG", compress_level=1)  # half the time of 6, a tenth more bytes
    return file.getvalue()


@functools.lru_cache
def _samples(cube: bool, view: tuple) -> tuple[int, int, int, int]:
    """Return how high a source need be, the samples of a pixel down and right, and the rows of a band."""
    rows, columns, *kind = view
    density = np.array([1 / np.abs(np.diff(_latitudes(rows, *kind))).max(), columns / (2 * np.pi)])
    finest = density.max()  # in px per radian on the horizon
    # Two samples a pixel each way, 7/8 of a source's pixel apart in the middle of a face: measured to be as
    # good for photographs as three are, and to turn a checkerboard grey.
    enough = math.ceil(1.75 * finest * (2 if cube else np.pi))
    down, right = np.minimum(np.rint(2 * finest / density), 8).astype(int).tolist()
    return enough, down, right, max(1, 2**17 // (columns * down * right))


def _latitudes(count: int, projection: str, latitude: float) -> np.ndarray:
    height, top = 1 - (2 * np.arange(count) + 1) / count, np.radians(latitude)
    if projection == "equirectangular":
        return height * top
    return np.arctan(np.sinh(height * np.arcsinh(np.tan(top))))  # arcsinh(tan v) = ln tan(π/4 + v/2)


@functools.lru_cache(maxsize=32)
def _band(cube: bool, side: int, view: tuple, start: int) -> tuple:
    """Return where the samples of some rows of a panorama lie in a source: see _locate."""
    rows, columns, *kind = view
    _, down, right, step = _samples(cube, view)
    v = _latitudes(rows * down, *kind)[start * down : (start + step) * down, None]
    u = ((np.arange(columns * right) + 0.5) / (columns * right) - 0.5) * 2 * np.pi
    return _locate(cube, side, _direction(u, v))


@functools.lru_cache
def _border(cube: bool, side: int) -> tuple:
    """Return the places of a source's border, and where the same directions lie inside of it."""
    mask = np.ones((6 if cube else 1, side + 2, (side if cube else 2 * side) + 2), bool)
    mask[:, 1:-1, 1:-1] = False
    face, row, column = mask.nonzero()
    if cube:
        a, b = (2 * column - 1) / side - 1, 1 - (2 * row - 1) / side
        right, up, out = np.moveaxis(FACES[face], 0, -1)
        direction = a * right + b * up + out
    else:
        direction = _direction(((column - 0.5) / side - 1) * np.pi, (0.5 - (row - 0.5) / side) * np.pi)
    return mask.ravel().nonzero()[0], *_locate(cube, side, direction)


def _direction(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return (x, y, z) of longitudes and latitudes, stacked."""
    return np.stack(np.broadcast_arrays(np.cos(v) * np.sin(u), np.sin(v), np.cos(v) * np.cos(u)))


def _locate(cube: bool, side: int, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Find directions (3, ...) in a source with a border.

    Returns: index of the pixel to the upper left of each, how far below and to the right of that pixel's
    centre it is, and the length of a row.
    """
    if cube:
        along = np.einsum("fij,j...->if...", FACES, direction)  # right, up and out of each face
        face = along[2].argmax(0)
        right, up, out = np.take_along_axis(along, face[None, None], 1)[:, 0]
        row, column, wide = (1 - up / out) / 2 * side, (1 + right / out) / 2 * side, side
    else:
        x, y, z = direction
        row, column = 0.5 - np.arctan2(y, np.hypot(x, z)) / np.pi, 1 + np.arctan2(x, z) / np.pi
        face, row, column, wide = 0, row * side, column * side, 2 * side
    row, column = row + 0.5, column + 0.5  # a pixel's centre is half a pixel in, and the border is one wide
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    index = (face * (side + 2) + top) * (wide + 2) + left
    return index.ravel(), *(x.ravel().astype(np.float32) for x in (row - top, column - left)), wide + 2


def _interpolate(pixels: np.ndarray, index, down, right, length: int) -> np.ndarray:
    weights = ((1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right)
    places = (index, index + 1, index + length, index + length + 1)
    return np.stack([sum(channel[i] * w for i, w in zip(places, weights)) for channel in pixels])


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
    # Half of the height, 1, stands for 60°, which is 1.05 in the units of x: with that the sun is round.
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


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------


def print_all_names() -> None:
    """Let print show a name that is not UTF-8 with backslashes, as stderr does, and not raise."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as UserError."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for a mistake of the user's, or 130 after Ctrl-C."""
    print_all_names()
    parser = Parser(prog="data.py", description="Turn cube maps and 2:1 images into panoramas for training.")
    commands = parser.add_subparsers(metavar="panorama", required=True)
    add = commands.add_parser("panorama", description=parser.description).add_argument
    add("source", metavar="SRC", help="folder or zip of cube maps and equirectangular images")
    add("folder", metavar="DST", help="folder for the panoramas")
    add("--size", default="256x768", metavar="HxW", help="rows x columns in px (256x768)")
    add("--projection", default="equirectangular", choices=("equirectangular", "mercator"), help="of rows")
    add("--latitude", type=float, help="of the upper border in degrees (60; mercator: for square pixels)")
    add("--workers", type=int, default=0, help="number of processes (0: one per core)")
    try:
        args = parser.parse_args(argv)
        size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", args.size, re.ASCII)
        rows, columns = map(int, size.groups()) if size else (0, 0)
        if not (4 <= rows <= 8192 and 4 <= columns <= 8192):
            raise UserError(f"--size {args.size} is no size; give rows x columns, each 4 to 8192: 256x768")
        # Mercator's pixels are square where a radian on the horizon, W/2π of them wide, is as many high.
        square = math.degrees(2 * math.atan(math.tanh(math.pi * rows / columns / 2)))
        mercator = args.projection == "mercator"
        latitude = args.latitude if args.latitude is not None else round(square, 4) if mercator else 60.0
        if not (0 < latitude < 90 or latitude == 90 and not mercator):
            raise UserError(f"--latitude {latitude:g} is out of range; give above 0 to 90, mercator under 90")
        if not 0 <= args.workers <= 1024:
            raise UserError(f"--workers {args.workers} is out of range; give 1 to 1024, or 0: one per core")
        view = rows, columns, args.projection, latitude
        print(make_panoramas(args.source, args.folder, view, args.workers))
    except UserError as error:
        print("error:", str(error).removeprefix("--data "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"train on them: python coco_gan.py train --panorama --data {shlex.quote(args.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
