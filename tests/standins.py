"""Stand-ins for the benchmarks, with the published columns, types and folders, and what is asked of
each row."""

import io
import json
import shutil
from pathlib import Path

import pyarrow
from PIL import Image
from pyarrow import parquet


def picture(side: int = 30) -> dict:
    """An image as Parquet files of the hub hold it."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return {"bytes": file.getvalue(), "path": "a.png"}


def numbered(count: int, of: int) -> dict:
    return {f"image_{n}": picture(29 + n) if n <= count else None for n in range(1, of + 1)}


DIRECTLY = "Answer with the option's letter from the given choices directly."
VSTAR = {"image": "direct_attributes/sa_1.jpg", "category": "direct_attributes", "question_id": 0}
VSTAR |= {"text": f"What colour is it?\n(A) red\n(B) blue: dark\n{DIRECTLY}", "label": "B"}
ABOUT = {"target_object": ["car", "dog"], "bbox": [[20, 10, 8, 6], [30, 20, 10, 10]]}  # x, y, w, h
ABOUT |= {"question": "What colour is it?", "options": ["blue: dark", "red"]}
MMMU = {"id": "test_Art_1", "answer": "B", "subject": "Art", "explanation": "", "img_type": "[]"}
STANDARD = MMMU | {"question": "Which of <image 2> and <image 1>?", "options": "['A', '<image 3>']"}
MME = {"question": "Is it red? Please answer yes or no.", "image": picture()}
MUIR = {"idx": "1", "task": "Counting", "image_relation": "", "image_type": "", "answer": "B"}
MUIR |= {"question": "<image> Which?", "options": ["<image>", "B", "A"], "counterpart_idx": None}
CHART = {"type": "human_test", "image": picture()}
VIZWIZ = {"question_id": "VizWiz_val_1.jpg", "image": picture(), "question": "what Colour is it?"}
VIZWIZ |= {"answers": ["dark red"] * 2 + ["dark-red"] + ["red"] * 5 + ["a rose", "none"]}
BLINK = {"idx": "val_1", "question": "Which?", "answer": "(B)", "explanation": ""}
BLINK |= {"choices": ["B", "A"], "prompt": "Look at both. Which?\n(A) B\n(B) A\n"}
CV = {"idx": 1, "type": "2D", "task": "Count", "image": picture(), "question": "How many?"}
CV |= {"choices": ["2", "1"], "answer": "(A)", "prompt": "How many? Choose.\n(A) 2\n(B) 1"}
CV |= {"filename": "x.png"}
LONG = {
    "video_id": "x",
    "id": "x_0",
    "video_path": "x.mp4",
    "question": "Who?",
    "correct_choice": 2,
}
LONG |= {f"option{n}": text for n, text in enumerate(("cat", "dog", "C", "N/A", "N/A"))}
LONG |= {"duration_group": 15, "subtitle_path": "x_en.json"}
NEXT = {"video": 4010, "question": "why", "answer": 3, "qid": 1, "type": "CW"}
NEXT |= {f"a{n}": text for n, text in enumerate(("0", "3", "1", "2", "4"))}
MME_V = {"video_id": "001", "duration": "short", "domain": "Art", "videoID": "x", "answer": "C"}
MME_V |= {"question": "Who?", "options": ["A. 1.", "B. Two", "C. Three.", "D. 4."]}
MMMU_V = {"id": "dev_Art_Theory_1", "question": "Which?", "options": ["1", "2"], "answer": "B"}
LV = {"uid": "1", "key": "x", "type": "cartoon", "video_path": "x.mp4", "answer": "A"}
LV |= {"question": "When?\n(A) 1636\n(B) 1366", "time_reference": "00:15-00:19"}
MV = {"video": "x.mp4", "question": "What?", "candidates": ["up", "down", "A"], "answer": "A"}
TEMP = {"video_id": "x", "dim": "action"}
TRUTH = TEMP | {"question": "What?\nA. a cat\nB. a dog", "answer": "B. a dog"}
CAPTION = TEMP | {"question": "Which?\nOption 1: a: b\nOption 2: c", "answer": "Option 1: a: b"}

# By benchmark: the rows of each file, the videos, and of each row in order the number of its media,
# its options, its solution and its source.
AB = ("A. 1", "B. 2")
STANDINS = {
    "vstar": (
        {"test_questions.jsonl": [VSTAR], "direct_attributes/sa_1.json": ABOUT},
        [(1, ("A. red", "B. blue: dark"), "B", "direct_attributes")],
    ),
    "mmmu_pro": (
        {"standard (10 options)/test-00000-of-00002.parquet": [STANDARD | numbered(3, 7)],
         "standard (4 options)/test-00000-of-00001.parquet": [STANDARD | numbered(3, 7)],
         "vision/test-00000-of-00001.parquet": [MMMU | {"image": picture(), "options": "[]"}]},
        [(3, ("A. A", "B. <image>"), "B", "standard"), (1, (), "B", "vision")],
    ),
    "mme": (
        {"data/test-00000-of-00001.parquet": [
            MME | {"question_id": "OCR/1.png", "answer": "Yes", "category": "OCR"},
            MME | {"question_id": "OCR/1.png", "answer": "No", "category": "OCR"}]},
        [(1, (), "Yes", "OCR"), (1, (), "No", "OCR")],
    ),
    "muirbench": (
        {"data/test-00000-of-00001.parquet": [MUIR | {"image_list": [picture(), picture(31)]}]},
        [(2, ("A. <image>", "B. B", "C. A"), "B", "Counting")],
    ),
    "chartqa": (
        {"data/test-00000-of-00001.parquet": [CHART | {"question": "How many?", "answer": "42"}]},
        [(1, (), "42", "human_test")],
    ),
    "vizwiz": (
        {"data/val-00000-of-00001.parquet": [VIZWIZ | {"category": "other"}],
         "data/test-00000-of-00001.parquet": [VIZWIZ | {"category": "hidden"}]},
        [(1, (), "red", "other")],
    ),
    "blink": (
        {"Jigsaw/val-00000-of-00001.parquet": [BLINK | numbered(3, 4) | {"sub_task": "Jigsaw"}],
         "IQ_Test/val-00000-of-00001.parquet": [BLINK | numbered(1, 4) | {"sub_task": "IQ_Test"}],
         "IQ_Test/test-00000-of-00001.parquet": [BLINK | numbered(1, 4) | {"sub_task": "hidden"}]},
        [(1, ("A. B", "B. A"), "B", "IQ_Test"), (3, ("A. B", "B. A"), "B", "Jigsaw")],
    ),
    "cv_bench": (
        {"test_2d.parquet": [CV | {"source": "COCO"}],
         "test_3d.parquet": [CV | {"source": "Omni3D"}]},
        [(1, ("A. 2", "B. 1"), "A", "COCO"), (1, ("A. 2", "B. 1"), "A", "Omni3D")],
    ),
    "longvideobench": (
        {"validation-00000-of-00001.parquet": [LONG], "lvb_val.json": [LONG], "videos/x.mp4": None},
        [(1, ("A. cat", "B. dog", "C. C"), "C", "15")],
    ),
    "nextqa": (
        {"MC/test-00000-of-00001.parquet": [NEXT], "OE/test-00000-of-00001.parquet": [{"x": 1}],
         "NExTVideo/4010.mp4": None},
        [(1, ("A. 0", "B. 3", "C. 1", "D. 2", "E. 4"), "D", "CW")],
    ),
    "videomme": (
        {"videomme/test-00000-of-00001.parquet": [MME_V], "data/x.mp4": None},
        [(1, ("A. 1.", "B. Two", "C. Three.", "D. 4."), "C", "short")],
    ),
    "videommmu": (
        {f"{part}/test-00000-of-00001.parquet": [MMMU_V | {"question_type": kind} | more]
         for part, kind, more in (
             ("Perception", "perception", {"options": [*AB]}),
             ("Comprehension", "multiple-choice", {}),
             ("Adaptation", "open", {"options": [], "answer": "3.5"}))}
        | {"Art/dev_Art_Theory_1.mp4": None},
        [(1, AB, "B", "Perception"), (1, AB, "B", "Comprehension"), (1, (), "3.5", "Adaptation")],
    ),
    "lvbench": (
        {"data/train-00000-of-00001.parquet": [LV], "x.mp4": None},
        [(1, ("A. 1636", "B. 1366"), "A", "cartoon")],
    ),
    "mvbench": (
        {"json/action_sequence.json": [MV | {"start": 0.5, "end": 1.0, "accurate_start": 1}],
         "json/episodic_reasoning.json": [MV | {"video": "s01_clip", "start": 1, "end": 2}],
         "video/star/Charades_v1_480/x.mp4": None,
         **{f"video/tvqa/frames_fps3_hq/s01_clip/{n:05}.jpg": None for n in range(1, 10)}},
        [(1, ("A. up", "B. down", "C. A"), "C", "action_sequence"),
         (1, ("A. up", "B. down", "C. A"), "C", "episodic_reasoning")],
    ),
    "tempcompass": (
        {"multi-choice/test-00000-of-00001.parquet": [TRUTH],
         "yes_no/test-00000-of-00001.parquet": [TEMP | {"question": "Is it?", "answer": "no"}],
         "caption_matching/test-00000-of-00001.parquet": [CAPTION],
         "captioning/test-00000-of-00001.parquet": [TEMP], "videos/x.mp4": None},
        [(1, ("A. a cat", "B. a dog"), "B", "multi-choice"), (1, (), "no", "yes_no"),
         (1, ("A. a: b", "B. c"), "A", "caption_matching")],
    ),
}  # fmt: skip


def write_standin(name: str, place: Path, video: Path) -> None:
    for file, rows in STANDINS[name][0].items():
        path = place / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mp4":
            shutil.copy(video, path)
        elif path.suffix == ".jpg":
            Image.new("RGB", (32, 32), (20 * int(path.stem),) * 3).save(path)
        elif path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("\n".join(map(json.dumps, rows)))
    if name == "vstar":
        Image.new("RGB", (40, 30)).save(place / VSTAR["image"])
