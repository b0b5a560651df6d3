"""Videos: whatever the container, the codec and the frame rate, the frames are those asked for, and
a small frame gets the tokens that the family gives it."""

import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import common
import ral_grpo
from support import data, media, toy
from support.grounding import Box
from support.prompts import Example, Media, Processor, PromptConfig, encode_prompt, process_media

B_FRAMES = {"bf": "3", "g": "10", "sc_threshold": "0"}
X265 = {"x265-params": "log-level=none:keyint=10:bframes=3:scenecut=0"}


def level(frame: int) -> int:
    return 4 + 4 * frame


def write(path: Path, codec: str, frames=60, rate=10, pixels="yuv420p", stamps=None, **fields):
    """Write a video whose frame i is grey of `level(i)`, its left edge black, shown at `stamps[i]`
    milliseconds (else at a constant rate)."""
    container_options = {"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", format=fields.get("format"), options=container_options) as file:
        file.metadata["title"] = "a title"
        sound = file.add_stream("aac", rate=48000) if fields.get("sound") else None
        stream = file.add_stream(codec, rate=rate, options=fields.get("options", {}))
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.bit_rate = fields.get("bit_rate", 2_000_000)
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            silence = np.zeros((2, 1024), np.float32)
            for i in range(20):
                samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
                samples.sample_rate, samples.pts = 48000, 1024 * i
                file.mux(sound.encode(samples))
        for i in range(frames):
            picture = np.full((48, 64, 3), level(i), np.uint8)
            picture[:, :16] = 0
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if stamps:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def seen(pictures: list[Image.Image]) -> list[int]:
    """Numbers of the frames, by their level."""
    levels = [np.asarray(picture)[:, 32:].mean() for picture in pictures]
    return [round((x - 3) / 4) for x in levels]  # ten bits come out a level or two darker


def read_video(path: Path, frames: int | None, fps: float | None) -> tuple[list, float]:
    """The frames of a video and its seconds per temporal patch. It is read twice, from the file and
    from its bytes, as a column of Parquet holds them."""
    video, inside = (
        media.read_video(source, frames, fps)
        for source in (path, media.MediaBytes(path.name, path.read_bytes()))
    )
    assert inside.is_video and len(inside.frames) == len(video.frames)
    assert all(map(np.array_equal, video.frames, inside.frames))
    assert inside.seconds_per_patch == video.seconds_per_patch
    return video.frames, video.seconds_per_patch


FORMATS = [
    ("h264.mp4", "libx264", {"options": B_FRAMES}),
    ("opengop.mp4", "libx264", {"options": B_FRAMES | {"x264-params": "open-gop=1"}}),
    ("h264-10bit.mp4", "libx264", {"pixels": "yuv420p10le", "options": B_FRAMES}),
    ("hevc.mp4", "libx265", {"options": X265}),
    ("hevc-10bit.mkv", "libx265", {"pixels": "yuv420p10le", "options": X265}),
    ("av1.mp4", "libsvtav1", {"bit_rate": 0, "options": {"crf": "20", "preset": "12"}}),
    ("vp9.webm", "libvpx-vp9", {"options": {"g": "10", "cpu-used": "8"}}),
    ("vp8.ogv", "libvpx", {"format": "ogg"}),
    ("h264.mov", "libx264", {"options": B_FRAMES}),
    ("sound-first.mp4", "libx264", {"options": B_FRAMES, "sound": True}),
    ("sound-first.mkv", "libx264", {"options": B_FRAMES, "sound": True}),
    ("h264.ts", "libx264", {"options": B_FRAMES}),
    ("hevc.ts", "libx265", {"options": X265}),
    ("mpeg4.avi", "mpeg4", {"options": {"bf": "2", "g": "10"}}),
    ("h264.avi", "libx264", {"options": B_FRAMES}),
    ("h264.flv", "libx264", {"options": B_FRAMES}),
    ("wmv2.wmv", "wmv2", {"format": "asf", "options": {"g": "10", "sc_threshold": "1000000000"}}),
    ("mpeg2.mpg", "mpeg2video", {"format": "mpeg", "rate": 25, "options": {"bf": "2", "g": "10"}}),
]


@pytest.mark.parametrize(("name", "codec", "fields"), FORMATS, ids=[x[0] for x in FORMATS])
def test_the_frames_asked_for(tmp_path, name, codec, fields):
    write(tmp_path / name, codec, **fields)
    rate = fields.get("rate", 10)
    for frames, expected in ((4, [0, 20, 39, 59]), (7, [0, 10, 20, 30, 39, 49, 59])):
        pictures, seconds = read_video(tmp_path / name, frames, None)
        assert seen(pictures) == expected
        assert seconds == pytest.approx(2 * 59 / rate / (frames - 1))
    assert seen(read_video(tmp_path / name, None, None)[0]) == list(range(60))
    assert len(read_video(tmp_path / name, None, 2.0)[0]) == round(60 / rate * 2)


@pytest.mark.parametrize("options", [B_FRAMES, {"bf": "3", "g": "250"}])
def test_a_video_reads_alike_every_time(tmp_path, options):
    write(tmp_path / "v.mp4", "libx264", options=options)
    for _ in range(20):
        assert seen(read_video(tmp_path / "v.mp4", 5, None)[0]) == [0, 15, 30, 44, 59]


# A screen recording: bursts of frames, and seconds in which nothing changes.
STAMPS = [0, 100, 200, 300, 400, 5000, 5100, 5200, 9000, 9100, 9200, 9300, 9400]
STAMPS += [10_000 + 40 * i for i in range(12)]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts"])
def test_fps_follows_the_time_stamps(tmp_path, name):
    write(tmp_path / name, "libx264", 25, stamps=STAMPS, options=B_FRAMES)
    pictures, seconds = read_video(tmp_path / name, None, 1.0)
    numbers = seen(pictures)
    count = round(25 / 24 * 10.44)  # of the mean frame, the last one has no end
    times = np.linspace(0, 10_440, count)
    nearest = {int(np.abs(np.array(STAMPS) - time).argmin()) for time in times}
    assert numbers == sorted(nearest) == [0, 4, 5, 7, 8, 12, 24]
    assert seconds == pytest.approx(2 * 10.44 / (len(numbers) - 1))
    pictures, seconds = read_video(tmp_path / name, 4, 1.0)
    assert seen(pictures) == [0, 5, 7, 24]  # 0, 3.48, 6.96 and 10.44 seconds
    assert seconds == pytest.approx(2 * 10.44 / 3)


def test_a_number_of_frames_counts_frames_at_any_rate(tmp_path):
    write(tmp_path / "v.mp4", "libx264", 25, stamps=STAMPS)
    pictures, seconds = read_video(tmp_path / "v.mp4", 4, None)
    assert seen(pictures) == [0, 8, 16, 24] and seconds == pytest.approx(2 * 10.44 / 3)


def test_rounded_time_stamps_are_a_constant_rate(tmp_path):
    write(tmp_path / "v.mkv", "libx264", rate=Fraction(30_000, 1001))  # stamps of milliseconds
    with av.open(str(tmp_path / "v.mkv")) as container:
        stamps, _, rate, times, _ = media.index_video(container, "v.mkv")
    assert len(set(np.diff(stamps))) == 2 and times is None
    assert rate == pytest.approx(29.97, abs=0.01)


@given(
    st.lists(st.floats(0.001, 100), min_size=1, max_size=50), st.integers(1, 40), st.floats(0.1, 9)
)
def test_no_frame_twice_at_any_time_stamps(gaps, frames, fps):
    times = np.cumsum([0.0, *gaps])
    rate = len(gaps) / times[-1]
    indices = media.frame_indices(len(times), rate, frames, fps, times)
    assert indices == sorted(set(indices)) and len(indices) <= frames
    assert 0 <= indices[0] <= indices[-1] < len(times)
    if frames > 1:
        assert (indices[0], indices[-1]) == (0, len(gaps))


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_a_turned_video_is_upright(tmp_path, turn):
    write(tmp_path / "flat.mp4", "libx264", 5)
    with (
        av.open(str(tmp_path / "flat.mp4")) as source,
        av.open(str(tmp_path / "turned.mp4"), "w") as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(turn)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    picture = read_video(tmp_path / "turned.mp4", 1, None)[0][0]
    flat = read_video(tmp_path / "flat.mp4", 1, None)[0][0]
    assert np.array_equal(np.asarray(picture), np.rot90(np.asarray(flat), turn // 90))
    cells = np.zeros((48, 64))
    cells[5:9, 30:50] = 1
    box = media.upright_box((30, 5, 50, 9), picture.size, picture.info["orientation"])
    left, top, right, bottom = box
    assert np.rot90(cells, turn // 90)[top:bottom, left:right].sum() == cells.sum()


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("v.mp4", "mpeg4"),
        ("v.avi", "mpeg4"),
        ("v.mkv", "mpeg4"),
        ("v.webm", "libvpx"),
        ("v.flv", "flv"),
        ("sound.mkv", "libx264"),
    ],
)
def test_half_of_a_file_is_named(tmp_path, name, codec):
    write(tmp_path / name, codec, sound=name == "sound.mkv", options={"g": "10"})
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(0.6 * len(whole))])
    words = r"is cut off: it has (\d+ of 60 frames|[\d.]+ of 6.. seconds)"
    with pytest.raises(media.BadRow, match=words):
        media.read_video(tmp_path / name, 4, None)


def test_a_last_frame_may_be_shown_for_long(tmp_path):
    """So may sound after it; neither is a cut file."""
    write(tmp_path / "v.webm", "libvpx", 4, stamps=[0, 100, 200, 9000])
    assert seen(read_video(tmp_path / "v.webm", 4, None)[0]) == [0, 1, 2, 3]
    write(tmp_path / "v.mkv", "libx264", 4, sound=True)
    assert seen(read_video(tmp_path / "v.mkv", 4, None)[0]) == [0, 1, 2, 3]


# start, end, frames, fps; the frames shown at ten a second
CLIPS = [
    (2, 4, 3, None, [20, 30, 40]),
    (2.05, 3.95, None, None, list(range(21, 40))),
    (0, 0, 4, None, [0]),
    (5.9, math.inf, 4, None, [59]),
    (4, 1000, 2, None, [40, 59]),
    (2, 4, None, 2.0, [20, 27, 33, 40]),
    (2, 4, 2, 2.0, [20, 40]),
]


@pytest.mark.parametrize(("start", "end", "frames", "fps", "expected"), CLIPS)
def test_a_clip_shows_no_other_frame(tmp_path, start, end, frames, fps, expected):
    for name, codec in (("v.mp4", "libx264"), ("v.avi", "mpeg4"), ("v.webm", "libvpx")):
        write(tmp_path / name, codec, options={"g": "10", "bf": "0"})
        clip = media.read_video(tmp_path / name, frames, fps, start, end)
        assert seen(clip.frames) == expected
        assert clip.times == pytest.approx([i / 10 for i in expected])
        with pytest.raises(media.BadRow, match=r"no frame from 6 to 7 seconds; .* from 0 to 5.9"):
            media.read_video(tmp_path / name, frames, fps, 6, 7)


def test_a_clip_of_a_variable_rate_follows_its_time_stamps(tmp_path):
    write(tmp_path / "v.mkv", "libx264", 25, stamps=STAMPS, options=B_FRAMES)
    clip = media.read_video(tmp_path / "v.mkv", None, 1.0, 5, 9.4)
    assert seen(clip.frames) == [5, 7, 8, 12] and clip.times == [5, 5.2, 9, 9.4]
    assert len(media.read_video(tmp_path / "v.mkv", None, None, 10, 11).frames) == 12


def test_images_are_the_frames_of_a_video(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for i, path in enumerate(paths):
        Image.new("L", (40, 30), level(i)).save(path)
    for rate, frames, fps, clip, expected in (
        (2, 16, None, (), range(8)),
        (2, 3, None, (), [0, 4, 7]),
        (2, None, 1.0, (), [0, 2, 5, 7]),
        (1, None, 1.0, (2, 4), [2, 3, 4]),
    ):
        video = media.read_frames(paths, rate, frames, fps, *clip)
        assert seen(video.frames) == list(expected) and video.is_video
        assert video.times == [i / rate for i in expected]
    Image.new("L", (30, 40)).save(paths[7])
    with pytest.raises(media.BadRow, match=r"7.png: a frame of \(30, 40\) after one of \(40, 30\)"):
        media.read_frames(paths, 2, 8, None)


def test_any_error_of_a_decoder_is_a_bad_row(tmp_path, monkeypatch):
    """EXIF whose software is a fraction, and whatever PyAV may raise."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    exif += b"\x0e\x01\x0c\0\x01\0\0\0\x06" + b"\0" * 7
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(media.BadRow, match=r"a.jpg: not .* image \(AttributeError: 'float'"):
        media.read_image(tmp_path / "a.jpg")
    write(tmp_path / "v.mp4", "libx264")
    monkeypatch.setattr(media, "index_video", lambda *_: [][0])
    with pytest.raises(media.BadRow, match=r"v.mp4: not .* video \(IndexError: list index"):
        media.read_video(tmp_path / "v.mp4", 4, None)


def test_an_unknown_codec_says_what_to_do(tmp_path):
    write(tmp_path / "v.mkv", "libx264")
    content = (tmp_path / "v.mkv").read_bytes()
    (tmp_path / "v.mkv").write_bytes(content.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ"))
    with pytest.raises(media.BadRow, match=r"no decoder for its codec; convert it with ffmpeg"):
        media.read_video(tmp_path / "v.mkv", 4, None)


def test_a_file_without_pictures_is_named(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        sound = file.add_stream("aac", rate=48000)
        samples = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        samples.sample_rate = 48000
        file.mux(sound.encode(samples))
        file.mux(sound.encode())
    with pytest.raises(media.BadRow, match="has no frames"):
        media.read_video(tmp_path / "v.mp4", 4, None)


def test_a_title_may_be_anything(tmp_path):
    write(tmp_path / "v.mp4", "libx264")
    content = (tmp_path / "v.mp4").read_bytes()
    assert b"a title" in content
    (tmp_path / "v.mp4").write_bytes(content.replace(b"a title", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9"))
    assert len(read_video(tmp_path / "v.mp4", 4, None)[0]) == 4


def test_memory_is_bounded_before_it_is_taken(tmp_path, monkeypatch):
    write(tmp_path / "v.mp4", "libx264")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2)  # of one frame
    with pytest.raises(media.BadRow, match="not a readable video"):
        media.read_video(tmp_path / "v.mp4", 4, None)
    monkeypatch.setattr(media, "MAX_FRAME_BYTES", 64 * 48 * 3 * 4 - 1)  # of all four
    with pytest.raises(media.BadRow, match="4 of its frames take more than"):
        media.read_video(tmp_path / "v.mp4", 4, None)


# Rows and columns of tokens, computed with Qwen2VLVideoProcessor of transformers 5.23 at its own
# minimum (128 x 28 x 28 pixels a frame) and the same maximum.
SIZES = [
    ((320, 180), 128, (9, 16)),
    ((640, 480), 128, (9, 13)),
    ((1920, 1080), 128, (8, 15)),
    ((64, 48), 128, (10, 14)),
    ((320, 180), 256, (9, 16)),
    ((1920, 1080), 256, (12, 21)),
    ((320, 180), 64, (6, 10)),
]


@pytest.mark.parametrize(("size", "tokens", "expected"), SIZES)
def test_a_frame_gets_the_tokens_of_the_family(size, tokens, expected):
    assert ral_grpo.Args.frame_tokens == 128
    own, asked = Qwen2VLImageProcessorPil(), PromptConfig({})
    processor = Processor(None, None, own, asked, frame_tokens=tokens)
    grid = process_media(processor, Media([Image.new("RGB", size)] * 2, True))[1]
    assert grid == (1, 2 * expected[0], 2 * expected[1])


def test_a_minimum_of_its_own_and_images_stay():
    frames = [Image.new("RGB", (2 * toy.CELL, 2 * toy.CELL))] * 2
    own = Qwen2VLImageProcessorPil(min_pixels=toy.CELL**2)  # as the toy's
    small = Processor(None, None, own, PromptConfig({}))
    assert process_media(small, Media(frames, True))[1] == (1, 4, 4)
    family = Processor(None, None, Qwen2VLImageProcessorPil(), PromptConfig({}))
    assert process_media(family, Media(frames[:1]))[1] == (1, 4, 4)


def test_a_picture_too_thin_for_the_processor_is_a_bad_row():
    processor = Processor(None, None, Qwen2VLImageProcessorPil(), PromptConfig({}))
    thin = Example("", "", [Media([Image.new("RGB", (4, 1000))])])
    source = SimpleNamespace(example=lambda row: thin, place=str)
    prompts = data.Prompts(source, lambda example: process_media(processor, example.media[0]))
    assert "aspect ratio must be smaller than 200" in prompts[0][1]["0"]


@pytest.mark.parametrize(("kind", "tokens"), [("image", 1), ("video", 2 * 9)])
def test_the_target_is_found_again_in_an_enlarged_picture(real, kind, tokens):
    """One red cell of 4 x 4. A frame becomes 12 x 12 tokens, so its cell has 9."""
    processor = common.load_processor(real / "qwen2_vl")
    picture = Image.new("RGB", (112, 112), "white")
    picture.paste("red", (56, 28, 84, 56))  # row 1, column 2
    is_video = kind == "video"
    media = [Media([picture] * (4 if is_video else 1), is_video)]
    boxes = (Box(56, 28, 84, 56),)
    prompt = encode_prompt(processor, Example("", "", media, boxes=boxes))
    green = prompt.blocks[0].pixels.view(-1, 4, 3, 2 * 14 * 14)[:, :, 1].mean(dim=(1, 2))
    assert prompt.target == tuple((green < 0).nonzero()[:, 0].tolist())
    assert len(prompt.target) == tokens
