"""The registry of families; a new one takes one file a room and one line, and a piece that is missing is told."""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning
import pytest
import torch
from torch import Tensor, nn

from osp.audit.golden import runners
from osp.conditioning import WordText
from osp.data.datamodule import ClipDataModule
from osp.data.sources import SyntheticClips
from osp.denoiser import CrossTransformer, Denoiser, JointTransformer, LatteTransformer, Stage
from osp.denoiser.attention import TokenBatch
from osp.denoiser.denoiser import LinearLayers, make_config
from osp.denoiser.flops import denoiser_flops, linear_layers
from osp.denoiser.layers import MLP, PatchEmbedding, initialise, sinusoid
from osp.denoiser.placement import Attend
from osp.devices import attention, count_flops
from osp.diffusion import Flow, Solver
from osp.errors import UsageError
from osp.sampling import VideoGenerator
from osp.training.checkpoints import load_trained_generator
from osp.training.denoiser_module import DenoiserModule
from osp.training.saving import LastCheckpoint
from osp.vae import WFVAE, CausalVideoVAE, LatentCodec, VideoVAE
from osp.weights import load_pretrained, load_published, published_settings, save_pretrained, to_published
from osp.weights.families import FAMILIES, family_of, find_class, find_kind, register
from osp.weights.files import WeightImportError
from osp.weights.keys import KeyPair
from osp.weights.layout import Family, Kind, Layout

ROOT = Path(__file__).resolve().parents[2]

# One file in the denoisers' room.


@dataclass(frozen=True)
class PlainConfig:
    """The shape of a plain transformer."""

    former_names: ClassVar[Mapping[str, str]] = {}

    channels: int = 4
    out_channels: int = 4
    heads: int = 2
    head_dim: int = 8
    text_channels: int = 16
    patch_size: int = 2
    stages: tuple[Stage, ...] = (Stage(2, "skiparse", 2),)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim


class PlainBlock(nn.Module):
    """Attention by a pattern, then to the text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.text_q = nn.Linear(width, width)
        self.text_kv = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, text: Tensor, attend: Attend) -> Tensor:
        """Tokens `B N D` and text `B L D` -> tokens."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        x = x + attend((q, k, v))[0].flatten(2)
        k, v = self.text_kv(text).unflatten(2, (2, self.heads, -1)).unbind(2)
        return x + attention(self.text_q(x).unflatten(2, (self.heads, -1)), k, v).flatten(2)


class PlainTransformer(Denoiser):
    """A small family of its own."""

    config: PlainConfig
    linear_layers = LinearLayers(
        {
            "patch.linear": "video",
            "time.up": "once",
            "time.down": "once",
            "text": "text",
            "blocks.*.qkv": "video",
            "blocks.*.text_q": "video",
            "blocks.*.text_kv": "text",
            "out": "video",
        },
        inputs=("patch.linear", "time.up", "text"),
        joint_text=False,
    )

    def __init__(self, stages: Sequence[Stage | Mapping[str, Any]] | None = None, **settings: Any) -> None:
        c = make_config(PlainConfig, settings if stages is None else settings | {"stages": stages})
        super().__init__(c, c.channels, c.text_channels)
        self.patch = PatchEmbedding(c.channels, c.width, c.patch_size)
        self.time = MLP(32, c.width, c.width, nn.SiLU())
        self.text = nn.Linear(c.text_channels, c.width)
        self.blocks = nn.ModuleList(PlainBlock(c.width, c.heads) for _ in self.schedule)
        self.out = nn.Linear(c.width, c.patch_size**2 * c.out_channels)
        initialise(self)

    def forward(
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        pooled_text: Tensor | None = None,
        video_mask: Tensor | None = None,
    ) -> Tensor:
        """See `Denoiser`; masks are not looked at."""
        grid = self.check(latent, time, text, text_mask, None, video_mask)
        placement = self.placed(TokenBatch(grid, len(latent), latent.device))
        x = self.patch(latent) + self.time(sinusoid(time, 32))[:, None]
        text = self.text(text)
        for i in range(len(self.blocks)):
            x = self.run_block(i, x, text, placement.attention(i))
        return self.to_latent(self.out(x), grid)


# One file in the room of weights.


def build(published: Mapping[str, Any], weights: Mapping[str, Any]) -> PlainTransformer:
    """The transformer of published settings."""
    if unknown := published.keys() - {"num_heads", "num_layers"}:
        raise UsageError(f"a published plain transformer has no setting {min(unknown)}")
    return PlainTransformer([Stage(published["num_layers"], "skiparse", 2)], heads=published["num_heads"])


def settings(model: PlainTransformer) -> dict[str, Any]:
    """The published settings of a transformer."""
    return {"num_heads": model.config.heads, "num_layers": len(model.blocks)}


def key_pairs(model: PlainTransformer) -> Iterator[KeyPair]:
    """Query, key and value are tensors of their own there."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if ".qkv." in name:
            parts = tuple(name.replace("qkv", part) for part in ("to_q", "to_k", "to_v"))
            yield KeyPair(name, parts, (shape[0] // 3, *shape[1:]))
        else:
            yield KeyPair(name, (f"net.{name}",), shape)


FAMILY = Family(
    "plain",
    PlainTransformer,
    Layout(lambda _: "PlainModel", key_pairs, settings),
    {"plain_v0": Kind(build, {"num_heads": 2, "num_layers": 2}, ({},))},
    former_names=("Plain",),
)


@pytest.fixture
def open_registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.fixture
def plain(open_registry: None) -> PlainTransformer:
    """A model of the new family, read from published weights."""
    register(FAMILY)  # the one line
    torch.manual_seed(0)
    pairs = list(key_pairs(PlainTransformer()))
    weights = {key: 0.3 * torch.randn(pair.published_shape) for pair in pairs for key in pair.published}
    return load_published("plain_v0", weights, {"num_heads": 2, "num_layers": 2})


def make_codec() -> LatentCodec:
    torch.manual_seed(0)
    sizes = {"base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4, "attention": False}
    return LatentCodec(WFVAE(latent_channels=4, encoder_blocks=1, decoder_blocks=1, **sizes), 0.0, 1.0)


def make_text() -> WordText:
    return WordText(channels=16, pooled_channels=None, layers=1, heads=2)


def test_weights_of_a_new_family_are_imported_saved_and_exported(plain: PlainTransformer, tmp_path: Path) -> None:
    published = to_published(plain)
    assert published["blocks.0.to_k.weight"].shape == (16, 16)
    assert torch.equal(published["blocks.0.to_k.weight"], plain.blocks[0].qkv.weight[16:32])
    assert published_settings(plain) == {"num_heads": 2, "num_layers": 2}
    with pytest.raises(WeightImportError, match=r"1 missing: net\.out\.bias"):
        load_published("plain_v0", {key: v for key, v in published.items() if key != "net.out.bias"})
    save_pretrained(plain, tmp_path)
    for name in ("PlainTransformer", "plain", "Plain"):  # its class, its family, and what it was called before
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"model": name}))
        again = load_pretrained(tmp_path)
        assert isinstance(again, PlainTransformer)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))


def test_operations_of_a_new_family_are_counted(plain: PlainTransformer) -> None:
    with torch.device("meta"):
        model = PlainTransformer()
        counted = count_flops(model, torch.empty(1, 4, 2, 8, 8), torch.empty(1), torch.empty(1, 5, 16))
    assert denoiser_flops(plain, (2, 8, 8), 5).forward == counted


def test_a_new_family_makes_videos_and_is_trained(plain: PlainTransformer, tmp_path: Path) -> None:
    clips = SyntheticClips(4, 5, 16, 16, objects=1, plain=True)
    data = ClipDataModule(clips, clips, batch_size=2, workers=0, val_clips=2)
    codec, before = make_codec(), [value.clone() for value in plain.parameters()]
    save_pretrained(codec.vae, tmp_path / "vae")
    codec.vae.origin = str(tmp_path / "vae")
    module = DenoiserModule(plain, make_text(), Flow(shift=1.0), codec, lr=1e-2, ema_decay=0.5)
    lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LastCheckpoint(tmp_path, 1)],
    ).fit(module, data)
    assert all(not torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))
    generator = load_trained_generator(tmp_path / "last.ckpt")
    assert isinstance(generator.denoiser, PlainTransformer)
    solver = Solver(generator.objective, "euler", 2)
    videos = generator.generate(["a red circle", "a blue one"], 5, 16, 16, seeds=[1, 2], solver=solver)
    assert videos.shape == (2, 3, 5, 16, 16)
    own = VideoGenerator(plain.eval(), make_text().eval(), Flow(shift=1.0), codec)
    assert own.generate(["a"], 5, 16, 16, seeds=[1], solver=solver).isfinite().all()


def test_a_new_family_can_be_compared_with_recorded_cases(plain: PlainTransformer) -> None:
    assert runners()["plain_v0"] is runners()["opensora_v13"]


class Undeclared(PlainTransformer):
    """Has one layer more than its family says."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.blocks[1].gate = nn.Linear(16, 16)


class Silent(Denoiser):
    """Says nothing of its layers."""


class Unfinished(VideoVAE):
    """Has no decoder."""

    settings: ClassVar[dict[str, Any]] = {}

    def encode_moments(self, video: Tensor, state: Any = None) -> Tensor:
        """Nothing."""
        return video


def test_a_layer_that_a_family_does_not_declare_is_not_counted_by_a_guess() -> None:
    with pytest.raises(UsageError, match=r"Undeclared: .* which rows blocks\.1\.gate sees; add 'blocks\.\*\.gate'"):
        denoiser_flops(Undeclared(), (2, 8, 8), 5)
    model = PlainTransformer()
    model.patch = nn.Conv3d(4, 16, 2)  # type: ignore[assignment]
    with pytest.raises(UsageError, match="the operations of patch, a Conv3d, cannot be counted"):
        linear_layers(model)


MISSING = [
    (replace(FAMILY, model=Silent), "family plain: Silent lacks linear_layers"),
    (replace(FAMILY, model=Unfinished), "family plain: Unfinished lacks decode_latent"),
    (replace(FAMILY, model=nn.Linear), "Linear is neither a Denoiser nor a VideoVAE"),
    (replace(FAMILY, kinds={}), "family plain: has no kinds"),
    (replace(FAMILY, name="cross"), "family cross: there is another cross"),
    (replace(FAMILY, former_names=("JointTransformer",)), "there is another JointTransformer"),
    (replace(FAMILY, kinds={"causalvae": FAMILY.kinds["plain_v0"]}), "there is another causalvae"),
]


@pytest.mark.parametrize(("family", "message"), MISSING)
def test_a_family_without_a_piece_or_with_a_name_that_is_taken_is_refused(
    family: Family, message: str, open_registry: None
) -> None:
    before = dict(FAMILIES)
    with pytest.raises(UsageError, match=message):
        register(family)
    assert before == FAMILIES


def test_a_tensor_that_the_layout_leaves_out_is_told(plain: PlainTransformer, open_registry: None) -> None:
    def without_bias(model: PlainTransformer) -> list[KeyPair]:
        return [pair for pair in key_pairs(model) if pair.ours != "out.bias"]

    published = to_published(plain)
    del published["net.out.bias"]
    FAMILIES["plain"] = replace(FAMILY, layout=replace(FAMILY.layout, key_pairs=without_bias))
    with pytest.raises(RuntimeError, match=r"family plain: its layout has no key for out\.bias"):
        load_published("plain_v0", published)


def test_what_is_not_registered_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^kind=plain_v0: is not known; choose wfvae_v13, "):
        load_published("plain_v0", {})
    with pytest.raises(UsageError, match="a PlainTransformer cannot be saved"):
        save_pretrained(PlainTransformer(), tmp_path)
    with pytest.raises(UsageError, match="no published form of a PlainTransformer"):
        to_published(PlainTransformer())
    with pytest.raises(
        UsageError, match=r"^model=WFVAE: is not known; choose LatteTransformer, CrossTransformer or JointTransformer$"
    ):
        find_class("WFVAE", Denoiser)


def test_each_family_goes_by_one_name() -> None:
    classes = {"wfvae": WFVAE, "causalvae": CausalVideoVAE, "latte": LatteTransformer}
    classes |= {"cross": CrossTransformer, "joint": JointTransformer}
    assert {name: family.model for name, family in FAMILIES.items()} == classes
    for name, kind in classes.items():
        assert find_class(name, nn.Module) is find_class(kind.__name__, nn.Module) is kind
    assert find_kind("opensora_inpaint_v13")[0].name == "cross"


@pytest.mark.parametrize("name", FAMILIES)
def test_full_sizes_of_each_family_are_described_wholly(name: str) -> None:
    family = FAMILIES[name]
    for kind in family.kinds.values():
        for size in kind.full_sizes:
            with torch.device("meta"):
                model = kind.build({**kind.defaults, **size}, {})
            assert family_of(model) is family
            assert {pair.ours for pair in family.layout_of(kind).key_pairs(model)} == set(model.state_dict())
            if isinstance(model, Denoiser):
                assert linear_layers(model)  # all of them, or it would have raised
                assert set(model.linear_layers.inputs) <= set(model.linear_layers.rows)


def test_each_family_has_a_configuration() -> None:
    targets = {
        line.split()[-1]
        for room in ("vae", "denoiser")
        for path in (ROOT / "conf" / room).glob("*.yaml")
        for line in path.read_text().splitlines()
        if line.startswith("_target_:")
    }
    for family in FAMILIES.values():
        room = "denoiser" if issubclass(family.model, Denoiser) else "vae"
        assert f"osp.{room}.{family.model.__name__}" in targets


def test_no_other_place_lists_the_classes() -> None:
    """A second list would have to be kept up with the registry; a class may be used alone, as by its own training."""
    classes = {family.model.__name__ for family in FAMILIES.values()}
    for path in (ROOT / "src" / "osp").rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert len(names & classes) <= 1, path
