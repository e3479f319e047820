"""T5 and CLIP from folders, as small real models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from text_folders import T5_SHAPE, save_clip, save_t5

from osp.conditioning import CLIPPooled, Pair, T5Text
from osp.errors import DataError, OspError, UsageError

CONF = Path(__file__).parents[2] / "conf" / "text"
PROMPTS = ["a red ring grows", "", "on a grey background, a small blue star moves to the left"]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_t5_gives_what_transformers_gives(tmp_path: Path, kind: str) -> None:
    folder = save_t5(tmp_path / kind, kind)
    encoder = T5Text(folder, channels=32, dtype="float32")
    encoded = encoder(PROMPTS)
    assert encoded.text.shape == (3, 58, 32)
    assert encoded.mask.sum(dim=1).tolist() == encoder.count_tokens(PROMPTS) == [17, 1, 58]
    assert encoded.pooled is None
    assert not encoded.text.requires_grad
    assert not encoder.model.training
    model = getattr(transformers, "T5EncoderModel" if kind == "t5" else "MT5EncoderModel").from_pretrained(folder)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[3 + byte for byte in prompt.encode()] + [1]])
        alone = model.eval()(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(encoded.text[i, : ids.shape[1]], alone, atol=1e-5, rtol=0)
    assert (encoded.text[~encoded.mask] == 0).all()


def test_a_whole_t5_in_several_files_is_read_without_its_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SHAPE, decoder_start_token_id=0))
    whole.save_pretrained(tmp_path / "t5", max_shard_size="20KB")
    assert len([*(tmp_path / "t5").glob("*.safetensors")]) > 1
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    encoder = T5Text(tmp_path / "t5", tokenizer=tmp_path / "tokenizer", dtype="float32")
    ids = torch.tensor([[3 + byte for byte in PROMPTS[0].encode()] + [1]])
    expected = whole.eval().encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(encoder(PROMPTS[:1]).text, expected, atol=1e-5, rtol=0)
    next((tmp_path / "t5").glob("*2-of*.safetensors")).unlink()
    with pytest.raises(DataError, match=r"1 of \d+ weight files are missing"):
        T5Text(tmp_path / "t5", tokenizer=tmp_path / "tokenizer")


def test_sentencepiece_vocabularies_of_the_published_folders(tmp_path: Path) -> None:
    folder = save_t5(tmp_path / "t5", "mt5")
    for file in folder.glob("*token*"):
        file.unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 20), model_prefix=str(folder / "spiece"), vocab_size=30,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "unk_token": "<unk>"})
    )
    encoder = T5Text(folder, dtype="float32")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ids, mask = encoder.tokenized(PROMPTS, strict=True)
    for i, prompt in enumerate(PROMPTS):
        assert ids[i][mask[i]].tolist() == [*pieces.encode(prompt), 1]


@pytest.mark.parametrize("whole", [False, True])
def test_clip_gives_what_transformers_gives(tmp_path: Path, whole: bool) -> None:
    folder = save_clip(tmp_path / "clip", whole)
    encoder = CLIPPooled(folder, channels=20, dtype="float32")
    pooled = encoder(PROMPTS)
    assert pooled.shape == (3, 20)
    assert encoder.count_tokens(["red ring", ""]) == [9, 2]
    model = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for i, prompt in enumerate(PROMPTS):
        expected = model(**tokenizer([prompt], return_tensors="pt")).text_embeds
        torch.testing.assert_close(pooled[i : i + 1], expected, atol=1e-5, rtol=0)
    # As published, where all prompts are padded to 77
    filled = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    torch.testing.assert_close(model(**filled).text_embeds, pooled, atol=1e-5, rtol=0)


def test_a_pair(t5_folder: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, pooled = T5Text(t5_folder, 128, dtype="float32"), CLIPPooled(clip_folder, dtype="float32")
    pair = Pair(tokens, pooled)
    assert (pair.channels, pair.pooled_channels, pair.max_tokens) == (32, 20, 128)
    encoded = pair.to("cpu")(PROMPTS, strict=True)
    assert torch.equal(encoded.text, tokens(PROMPTS).text)
    assert encoded.pooled is not None
    assert torch.equal(encoded.pooled, pooled(PROMPTS))
    long = "x" * 100  # more than CLIP reads, less than T5 does
    assert len(pair([long], strict=True)) == 1
    assert not caplog.records
    with pytest.raises(UsageError, match="151 tokens, and t5 reads 128"):
        pair(["x" * 150], strict=True)


def test_too_long_prompts(t5_folder: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = T5Text(t5_folder, max_tokens=6, dtype="float32")
    assert encoder(["a red ring", "blue"]).text.shape[1] == 6
    assert torch.equal(encoder(["a red ring"]).text, encoder(["a red"]).text)
    with pytest.raises(UsageError, match="'a red ring' has 11 tokens, and t5 reads 6; shorten it"):
        encoder(["a red ring"], strict=True)
    assert len(caplog.records) == 1
    with pytest.raises(UsageError, match="has 102 tokens, and clip reads 77"):
        CLIPPooled(clip_folder)(["x" * 100], strict=True)


def test_fingerprints(t5_folder: Path, tmp_path: Path) -> None:
    made = T5Text(t5_folder, dtype="float32").fingerprint()
    copy = shutil.copytree(t5_folder, tmp_path / "copy")
    assert T5Text(copy, dtype="float32").fingerprint() == made
    assert T5Text(copy, dtype="bfloat16").fingerprint() != made
    assert T5Text(copy, max_tokens=100, dtype="float32").fingerprint() != made
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    data[-400:-200] = bytes(200)
    (copy / "model.safetensors").write_bytes(data)
    assert T5Text(copy, dtype="float32").fingerprint() != made


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damaged_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def half_of_the_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def wider_in_the_config(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text()) | {"d_ff": 64}
    (folder / "config.json").write_text(json.dumps(settings))


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (no_folder, UsageError, "no such folder"),
        (no_config, UsageError, "no config.json"),
        (another_model, UsageError, "model_type is 'bert'; a folder of t5 or mt5"),
        (broken_config, DataError, "cannot be read"),
        (only_pickles, UsageError, r"only pickled weights \(pytorch_model.bin\); model.safetensors is wanted"),
        (no_weights, UsageError, "holds no weights"),
        (damaged_weights, DataError, "its weights cannot be read"),
        (half_of_the_weights, DataError, r"1 weights are missing .*encoder.block.1.layer.0.SelfAttention.q.weight"),
        (wider_in_the_config, DataError, "of another shape"),
        (no_tokenizer, DataError, "its tokenizer has no vocabulary"),
    ],
)
def test_bad_folders(
    t5_folder: Path, tmp_path: Path, harm: Callable[[Path], None], error: type[OspError], message: str
) -> None:
    folder = shutil.copytree(t5_folder, tmp_path / "bad")
    harm(folder)
    with pytest.raises(error, match=message) as raised:
        T5Text(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_wrong_widths_and_types(t5_folder: Path, clip_folder: Path) -> None:
    with pytest.raises(UsageError, match="its text is 32 wide, but channels=4096"):
        T5Text(t5_folder, channels=4096)
    with pytest.raises(UsageError, match="its text is 20 wide, but channels=1280"):
        CLIPPooled(clip_folder, channels=1280)
    with pytest.raises(UsageError, match="model_type is 't5'"):
        CLIPPooled(t5_folder)
    with pytest.raises(UsageError, match="dtype=int8"):
        T5Text(t5_folder, dtype="int8")


def test_code_in_a_folder_is_not_run(t5_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(t5_folder, tmp_path / "bad")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name, key in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        settings = json.loads((folder / name).read_text())
        settings["auto_map"] = {key: "evil.Evil" if key == "AutoModel" else ["evil.Evil", None]}
        if key == "AutoTokenizer":
            settings["tokenizer_class"] = "Evil"
        (folder / name).write_text(json.dumps(settings))
    with pytest.raises(DataError, match="tokenizer cannot be read"):
        T5Text(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_configurations(name: str, t5_folder: Path, clip_folder: Path) -> None:
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    if name == "words":
        encoder = instantiate(settings)
        assert encoder(PROMPTS).text.shape[2] == 192
        size = f"{sum(value.numel() for value in encoder.parameters()):,} parameters"
        assert size in (CONF / "words.yaml").read_text()
        return
    parts = {"t5": settings} if "path" in settings else {"t5": settings["tokens"], "clip": settings["pooled"]}
    for kind, part in parts.items():
        part |= {"path": str({"t5": t5_folder, "clip": clip_folder}[kind])}
        with pytest.raises(InstantiationException, match=f"but channels={part['channels']}"):
            instantiate(part)
        part["channels"] = None
    encoder = instantiate(settings)
    assert encoder.max_tokens == (300 if name == "t5_v10" else 512)
    assert encoder(PROMPTS).text.dtype == torch.bfloat16


def test_pointers_and_broken_weights_of_text_encoders_are_named(t5_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(t5_folder, tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    key = next(iter(weights))
    save_file(weights | {key: weights[key].clone().fill_(float("nan"))}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="holds numbers that are not finite"):
        T5Text(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(DataError, match=rf"{name}: is a Git LFS pointer"):
            T5Text(folder)
    (folder / "config.json").write_text('{"model_type": "t5", "d_model": "wide"}')
    with pytest.raises(DataError, match="d_model: must be a whole number"):
        T5Text(folder)
