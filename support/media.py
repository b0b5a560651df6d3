"""Images and videos from untrusted files, or from their bytes in a data file."""

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from support.prompts import Media
from support.ranks import first_line

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no format that runs a program
# The EXIF orientation that stands for a video's rotation in degrees.
ORIENTATIONS = {0: 1, 90: 8, -90: 6, 180: 3, -180: 3}
MAX_FRAMES, MAX_FRAME_BYTES = 128, 2**32  # of a video without --frames (paper); of a row's frames
# FFmpeg's names of containers with unusable time stamps: AVI stamps the decoding order, and MPEG-PS
# leaves frames unstamped.
UNSTAMPED = ("avi", "mpeg")
# Options for opening a video: it cannot open network addresses, and its metadata may be any bytes.
UNTRUSTED = {"options": {"protocol_whitelist": "file"}, "metadata_errors": "replace"}
# The first bytes of video files: MP4 and QuickTime, Matroska and WebM, AVI, FLV, WMV, MPEG-PS,
# MPEG-TS, Ogg. A playlist, which could open other files, does not match; nor does a GIF.
VIDEO = rb"....(?:ftyp|moov|mdat|free|skip|wide|pnot)|\x1aE\xdf\xa3|RIFF....AVI |FLV|0&\xb2u"
VIDEO += rb"|\x00\x00\x01[\xba\xb3]|(?!GIF8)(?:....)?G.{187}(?:....)?G|OggS"
VIDEO = re.compile(VIDEO, re.DOTALL)


class BadRow(Exception):
    """A row that cannot be used; the message says why."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn any exception raised while reading `what` into a `BadRow`, since hostile bytes make
    decoders raise any, among them a MemoryError for a size that the bytes claim."""
    try:
        yield
    except BadRow:
        raise
    except Exception as error:
        raise BadRow(f"{what} ({first_line(error)})") from None


@dataclass
class MediaBytes:
    """The content of a media file, opened like a `Path`."""

    name: str
    content: bytes

    def open(self, mode: str) -> BytesIO:
        return BytesIO(self.content)


MediaFile = Path | MediaBytes


def is_video(path: MediaFile) -> bool:
    """Whether a file is a video, by its first bytes."""
    with reading(f"{path.name}: cannot be read"), path.open("rb") as file:
        return VIDEO.match(file.read(512)) is not None


def read_image(path: MediaFile) -> Image.Image:
    """Read an image as upright RGB; transparent areas become white. Its `info["orientation"]` says
    how it is stored, as in EXIF: 1 (upright) to 8.

    Raises:
        BadRow: the image cannot be read, or is too large.
    """
    unreadable = f"{path.name}: not a readable image"
    with reading(unreadable), path.open("rb") as file:
        try:
            image = Image.open(file, formats=IMAGE_FORMATS)
        except UnidentifiedImageError:
            raise BadRow(f"{unreadable} ({', '.join(IMAGE_FORMATS)})") from None
        if image.mode in ("I", "F"):  # their value range is unknown
            raise BadRow(f"{path.name}: pixels of mode {image.mode} are not supported")
        turned = image.getexif().get(ExifTags.Base.Orientation)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip at 255, not scale
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
        image.info["orientation"] = turned if turned in range(1, 9) else 1
        return image


def frame_indices(
    total: int, rate: float, frames: int | None, fps: float | None, times: np.ndarray | None = None
) -> list[int]:
    """Choose from `total` frames, shown at `rate` per second: `frames` of them, evenly spaced from
    first to last, or `fps` per second, but at most `frames` (128 if None).

    `times` (total,) are the seconds at which the frames of a variable-rate video are shown. With
    `times`, `fps` takes the frames nearest to evenly spaced times. `frames` alone still spaces
    indices evenly, as Video-R1 and the models' release do, which gives exactly the requested
    number. No frame is taken twice: a shorter video gives all its frames.
    """
    count = MAX_FRAMES if frames is None else frames
    if fps is not None:
        count = min(count, max(2, round(total / rate * fps)))
    if fps is None or times is None:
        places = np.linspace(0, total - 1, min(count, total))
    else:  # fractional frame index of each time; rounding gives the nearest frame
        places = np.interp(np.linspace(times[0], times[-1], count), times, np.arange(total))
    return np.unique(places.round().astype(int)).tolist()


def read_video(
    path: MediaFile, frames: int | None, fps: float | None, start: float = 0, end: float = math.inf
) -> Media:
    """The chosen frames of a video, upright, with the times at which it shows them. They are chosen
    from those shown from `start` to `end` (seconds, both included).

    Raises:
        BadRow: the video is cut off or too large, shows no frame from `start` to `end`, or a frame
            cannot be decoded.
    """
    with reading(f"{path.name}: not a readable video"):
        if not is_video(path):
            raise BadRow(f"{path.name}: not a video, by its first bytes")
        with open_video(path) as container:
            stamps, keys, rate, times, (width, height) = index_video(container, path.name)
        shown = np.arange(len(stamps)) / rate if times is None else times
        clip = in_clip(shown, start, end, path.name)
        if times is not None and 1 < len(clip) < len(times):
            rate = (len(clip) - 1) / (times[clip[-1]] - times[clip[0]])
        chosen = frame_indices(len(clip), rate, frames, fps, None if times is None else times[clip])
        indices = clip[chosen].tolist()
        if len(indices) * width * height * 3 > MAX_FRAME_BYTES:
            raise BadRow(f"{path.name}: {len(indices)} of its frames take more than 4 GB")
        pictures = seek_frames(path, [stamps[i] for i in indices], keys)
        pictures = pictures or count_frames(path, indices)
    if len(pictures) < len(indices):
        raise BadRow(f"{path.name}: some of its {len(stamps):,} frames cannot be decoded")
    return Media(pictures, is_video=True, times=shown[indices].tolist())


def read_frames(
    paths: Sequence[MediaFile],
    rate: float,
    frames: int | None,
    fps: float | None,
    start: float = 0,
    end: float = math.inf,
) -> Media:
    """The chosen frames of a video whose frames are image files, `rate` a second; see `read_video`.

    Raises:
        BadRow: an image cannot be read, or they are of different sizes or too large together.
    """
    shown, pictures = np.arange(len(paths)) / rate, []
    clip = in_clip(shown, start, end, paths[0].name)
    indices = clip[frame_indices(len(clip), rate, frames, fps)].tolist()
    for i in indices:
        pictures.append(read_image(paths[i]))
        if pictures[-1].size != (size := pictures[0].size):
            raise BadRow(f"{paths[i].name}: a frame of {pictures[-1].size} after one of {size}")
        if len(indices) * size[0] * size[1] * 3 > MAX_FRAME_BYTES:
            raise BadRow(f"{paths[i].name}: {len(indices)} such frames take more than 4 GB")
    return Media(pictures, is_video=True, times=shown[indices].tolist())


def in_clip(shown: np.ndarray, start: float, end: float, name: str) -> np.ndarray:
    """Indices of the frames shown from `start` to `end`; a time stamp is exact to a millisecond."""
    clip = np.flatnonzero((shown > start - 1e-3) & (shown < end + 1e-3))
    if not len(clip):
        lasts = f"its frames are shown from 0 to {shown[-1]:g}"
        raise BadRow(f"{name}: has no frame from {start:g} to {end:g} seconds; {lasts}")
    return clip


def open_video(path: MediaFile) -> Any:
    import av

    return av.open(str(path) if isinstance(path, Path) else path.open("rb"), **UNTRUSTED)


def index_video(
    container: Any, name: str
) -> tuple[list[int], list[int], float, np.ndarray | None, tuple[int, int]]:
    """Index the frames of an open video from its packets, without decoding them.

    Returns time stamps in display order, those of keyframes (none if stamps are unreliable), frames
    per second, the seconds at which frames are shown (None at a constant rate), and width and
    height.

    Raises:
        BadRow: the video has no frames or fewer than it announces, or no decoder knows its codec.
    """
    video = container.streams.best("video")
    if video is not None and video.codec_context is None:
        mend = "convert it with ffmpeg -i OLD -c:v libx264 -pix_fmt yuv420p NEW.mp4"
        raise BadRow(f"{name}: there is no decoder for its codec; {mend}")
    # If a container announces only its duration, compare that with the end of its streams.
    by_time = video is not None and not video.frames and container.format.name not in UNSTAMPED
    announced = (container.duration or 0) / 1e6 if by_time else 0
    demuxed = container.demux(*([] if announced else [video])) if video is not None else ()
    packets, last = [], 0.0  # the packets themselves would hold the whole file in memory
    for p in demuxed:
        if p.size and p.stream_index == video.index:
            packets.append((p.pts, p.is_keyframe, p.is_discard))
        if announced and p.size and p.pts is not None:
            last = max(last, float((p.pts + (p.duration or 0)) * p.time_base))
    cut = sum(is_discard for _, _, is_discard in packets)  # decoded but not shown
    if len(packets) == cut or not video.width or not video.height:
        raise BadRow(f"{name}: has no frames")
    if len(packets) < 0.9 * video.frames:  # some containers also count dropped frames
        raise BadRow(f"{name}: is cut off: it has {len(packets):,} of {video.frames:,} frames")
    stamps = sorted({pts for pts, _, is_discard in packets if pts is not None and not is_discard})
    last -= (container.start_time or 0) / 1e6
    longest = max(np.diff(stamps), default=0) * float(video.time_base)  # the last frame's, perhaps
    if announced and last + longest < 0.9 * announced:
        raise BadRow(f"{name}: is cut off: it has {last:.1f} of {announced:.1f} seconds")
    rate, size = float(video.average_rate or video.guessed_rate or 1), (video.width, video.height)
    if container.format.name in UNSTAMPED or any(pts is None for pts, _, _ in packets):
        return list(range(len(packets) - cut)), [], rate, None, size
    keys = sorted({pts for pts, is_key, _ in packets if is_key})
    times = (np.array(stamps) - stamps[0]) * float(video.time_base)
    if np.abs(times - np.arange(len(times)) / rate).max() < 0.5 / rate:
        return stamps, keys, rate, None, size
    return stamps, keys, (len(times) - 1) / times[-1], times, size


def seek_frames(path: MediaFile, wanted: list[int], keys: list[int]) -> list[Image.Image]:
    """Decode the frames with the time stamps `wanted` (ascending), each from the keyframe before
    it. Returns no frames if any of them is not found."""
    pictures, key = [], None
    with open_video(path) as container:
        video = first_video(container)
        for stamp in wanted if keys else ():
            before = keys[max(0, bisect_right(keys, stamp) - 1)]
            if before != key:
                key = before
                container.seek(key, stream=video)
                decoded = container.decode(video)
            frame = next((f for f in decoded if f.pts is not None and f.pts >= stamp), None)
            if frame is None or frame.pts != stamp:
                return []
            pictures.append(upright(frame, video))
    return pictures


def count_frames(path: MediaFile, indices: list[int]) -> list[Image.Image]:
    """Decode the frames with these numbers, counted from the beginning: slower, but correct even if
    time stamps or seeking are not."""
    with open_video(path) as container:
        video, chosen = first_video(container), set(indices)
        decoded = enumerate(islice(container.decode(video), indices[-1] + 1))
        return [upright(frame, video) for number, frame in decoded if number in chosen]


def first_video(container: Any) -> Any:
    video = container.streams.best("video")
    video.codec_context.thread_count = 1  # worker processes run in parallel instead
    # A frame may announce a larger size than the file does. Limit it to 89 MP, as for images.
    video.codec_context.options = {"max_pixels": str(Image.MAX_IMAGE_PIXELS)}
    return video


def upright(frame: Any, video: Any) -> Image.Image:
    """Convert a decoded frame to RGB in the video's initial size, rotated as the file specifies.
    Its `info["orientation"]` is as in `read_image`, but None if it is not rotated by quarters."""
    picture = frame.to_image(width=video.width, height=video.height)
    picture = picture.rotate(frame.rotation, expand=True)
    picture.info["orientation"] = ORIENTATIONS.get(frame.rotation)
    return picture


def upright_box(
    box: tuple[float, float, float, float], size: tuple[int, int], orientation: int
) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) of a stored image, in its upright picture of this size."""
    left, top, right, bottom = box
    if orientation >= 5:  # the first row of the stored image is a column of the picture
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 6, 7):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 7, 8):
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom
