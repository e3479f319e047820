"""Captions, prompts and records that people and other programs write, as they are fuzzed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from osp.audit.fuzz.media import still
from osp.audit.fuzz.subject import Reading, Subject
from osp.data.media.video import VideoInfo
from osp.data.shards.annotation_files import annotation_files
from osp.data.shards.annotations import AnnotationReader
from osp.data.shards.captions import Captions, read_captions
from osp.sampling.outputs import SampleFolder
from osp.sampling.requests import list_videos, read_requests
from osp.training.runs import TrainingRun

_NAMES = ("a.jpg", "b.jpg", "c.jpg")
_RESULT = {"name": "vae", "steps": 4, "parameters": 1000, "seconds": 1.5, "val/psnr": 20.0, "mode": "max"}
CONFIG: dict[str, Any] = {
    "name": "vae",
    "seed": 0,
    "vae": {"_target_": "osp.vae.WFVAE", "latent_channels": 4, "attention": False},
    "module": {"lr": 1e-4, "vae": {"path": None}, "decay_until": 30},
    "clip": {"frames": 9, "height": 32, "width": 32, "fps": None},
    "data": {"batch_size": 2, "train": {"path": "data/shards", "frames": 9}},
    "trainer": {"max_steps": 30, "val_check_interval": 10},
}


def make_sidecars(folder: Path) -> None:
    """Three pictures: one with a JSON file beside it, one with a text, one with both."""
    for name in _NAMES:
        (folder / name).write_bytes(still("JPEG"))
    (folder / "a.json").write_text(json.dumps({"caption": "a dog", "aesthetic": 5.5, "tags": ["dog"]}))
    (folder / "b.txt").write_text("a cat\n")
    (folder / "c.txt").write_text("a bird\n")
    (folder / "c.json").write_text(json.dumps({"motion": 3}))


def make_captions(name: str, folder: Path) -> None:
    """Three pictures and a captions file."""
    for picture in _NAMES:
        (folder / picture).write_bytes(still("JPEG"))
    rows = [{"file": picture, "caption": f"picture {picture}", "score": 1.5} for picture in _NAMES]
    if name.endswith(".csv"):
        text = "file,caption,score\n" + "".join('{file},"{caption}, brown",{score}\n'.format(**row) for row in rows)
    elif name.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps([{"path": row["file"], "cap": [row["caption"]]} for row in rows])
    (folder / name).write_text(text)


def make_annotations(name: str, folder: Path) -> None:
    """Three pictures, and annotations of parts of them; of a list the file that it names too."""
    for picture in _NAMES:
        (folder / picture).write_bytes(still("JPEG"))
    rows: list[dict[str, Any]] = [
        {"path": picture, "cap": ["a picture", "another"], "resolution": {"height": 8, "width": 8}, "aes": 5.5}
        for picture in _NAMES
    ]
    rows[1] |= {"crop": [0, 4, 2, 8], "cut": [0, 1], "num_frames": 1, "fps": 24}
    if name.endswith(".csv"):
        text = "path,text,num_frames,fps,height,width,aes\n" + "".join(f'{row},"a b",1,24,8,8,5\n' for row in _NAMES)
    else:
        text = json.dumps(rows)
    (folder / name).write_text(text)
    (folder / "data.txt").write_text(f".,{name}\n")


def make_prompts(name: str, folder: Path) -> None:
    """A file of prompts, and a picture that one of them goes on from."""
    (folder / "a.jpg").write_bytes(still("JPEG"))
    lines: list[dict[str, Any]] = [
        {"prompt": "a red circle", "seed": 3, "frames": 5, "height": 32, "width": 32},
        {"prompt": "a dog", "negative_prompt": "blur", "image": "a.jpg", "name": "dog"},
    ]
    is_plain = name.endswith(".txt")
    (folder / name).write_text("".join((line["prompt"] if is_plain else json.dumps(line)) + "\n" for line in lines))


def make_run(folder: Path) -> None:
    """Write the files that a training run leaves beside its checkpoints."""
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    (folder / "result.json").write_text(json.dumps(_RESULT))


def make_samples(folder: Path) -> None:
    """A list of made videos."""
    about = {"prompt": "a dog", "seed": 0, "frames": 1, "height": 32, "width": 32, "fps": 8.0, "solver": {"steps": 4}}
    (folder / "samples.jsonl").write_text("".join(json.dumps({"path": f"{n}.png", **about}) + "\n" for n in range(2)))
    for number in range(2):
        (folder / f"{number}.png").write_bytes(still("PNG16"))


def read_sidecars(folder: Path, reading: Reading) -> None:
    """The captions beside the pictures; what cannot be read is passed over."""
    for name in _NAMES:
        reading(Captions().find, folder / name)


def read_captions_file(name: str, folder: Path, reading: Reading) -> None:
    """The captions in a file, and which the pictures get."""
    found = reading(read_captions, folder / name, folder)
    if found is not None:
        for picture in _NAMES:
            reading(found.find, folder / picture)


def read_annotations(name: str, folder: Path, reading: Reading) -> None:
    """The clips of annotations and of the list that names them, and why others are left out."""
    for path in (folder / name, folder / "data.txt"):
        reader = AnnotationReader()
        for file in reading(annotation_files, path) or ():
            for clip in reading(reader.read, file) or ():
                reading(clip.part, VideoInfo(1, 0.0, 8, 8, 0.0, "jpeg", "image"))
        reading(dict, reader.unfit.counts)


def read_prompts(name: str, folder: Path, reading: Reading) -> None:
    """The requests of a file, the names of their videos, and their pictures."""
    requests = reading(read_requests, folder / name) or []
    reading(list_videos, requests[:50], 0, 2)
    for request in requests[:5]:
        pictures = request.pictures(1)
        if reading(pictures.check, None) is None and pictures.files:
            reading(pictures.contents)


def read_run(folder: Path, reading: Reading) -> None:
    """Read the settings, name and result in a run's folder, and whether a run of the same settings can go on."""
    run = TrainingRun(folder)
    for told in (run.config, run.name, run.result):
        reading(told)
    reading(run.finished, 4)
    reading(run.other_setting, CONFIG)


def read_samples(folder: Path, reading: Reading) -> None:
    """Read the list of made videos, then write the list anew and read its bytes."""
    made = reading(SampleFolder, folder, "png")
    if made is not None:
        reading(lambda: made.listed)
        reading(made.finish)
        reading((folder / "samples.jsonl").read_bytes)


SUBJECTS = [
    Subject("sidecars", make_sidecars, read_sidecars, ["*.json", "*.txt"]),
    *(
        Subject(name, partial(make_captions, name), partial(read_captions_file, name), [name])
        for name in ("captions.jsonl", "captions.csv", "captions.json")
    ),
    *(
        Subject(
            f"annotations_{name}", partial(make_annotations, name), partial(read_annotations, name), [name, "*.txt"]
        )
        for name in ("a.json", "a.csv")
    ),
    *(
        Subject(name, partial(make_prompts, name), partial(read_prompts, name), [name])
        for name in ("prompts.jsonl", "prompts.txt")
    ),
    Subject("samples", make_samples, read_samples, ["*.jsonl"]),
]
CONFIGS = [Subject("run", make_run, read_run, ["*.yaml", "*.json"], weight=3)]
