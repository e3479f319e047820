"""Published denoisers of v1.5 <-> our joint transformer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from osp.denoiser import JointTransformer, Stage
from osp.denoiser.rotary import halves_first
from osp.errors import UsageError
from osp.weights.joint_stages import held
from osp.weights.keys import KeyPair, Setting, check_settings, settings_from_published, settings_to_published
from osp.weights.layout import TORCH, Family, Kind, Layout, Reading

_SETTINGS = {
    "in_channels": Setting("channels"),
    "out_channels": Setting("out_channels"),
    "num_heads": Setting("heads"),
    "head_dim": Setting("head_dim"),
    "caption_channels": Setting("text_channels"),
    "pooled_projection_dim": Setting("pooled_channels"),
    "timestep_embed_dim": Setting("modulation_width"),
    "patch_size": Setting("patch_size"),
    "skip_connection": Setting("long_skips"),
}
_SAME_IN_ALL = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "double_ff": True,
    "dropout": 0.0,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-6,
    "patch_size_t": 1,
}
# Entries that do not shape the network.
_NOT_SHAPING = {"skip_connection_zero_init": True}

DEFAULTS: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_heads": 24,
    "head_dim": 128,
    "caption_channels": 2048,
    "pooled_projection_dim": 1280,
    "timestep_embed_dim": 1024,
    "patch_size": 2,
    "skip_connection": True,
    "num_layers": [2, 4, 6, 8, 6, 4, 2],
    "sparse1d": True,
    "sparse_n": [1, 2, 4, 8, 4, 2, 1],
}
FULL_SIZES: tuple[dict[str, Any], ...] = ({},)

# Ours -> theirs
_TOP = {
    "patch.linear": "patch_embed.proj",
    "time.up": "time_text_embed.timestep_embedder.linear_1",
    "time.down": "time_text_embed.timestep_embedder.linear_2",
    "pooled_text.up": "time_text_embed.text_embedder.linear_1",
    "pooled_text.down": "time_text_embed.text_embedder.linear_2",
    "text": "caption_projection",
    "norm": "norm_final",
    "out_norm": "norm_out.norm",
    "out_modulation": "norm_out.linear",
    "out": "proj_out",
}
_SKIPS = {"video_skips": "skip_norm_linear", "text_skips": "skip_norm_linear_enc"}
_IN_BLOCK = {
    "attention_modulation": ("norm1.linear",),
    "feed_forward_modulation": ("norm2.linear",),
    "video.attention_norm": ("norm1.norm",),
    "video.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "video.q_norm": ("attn1.norm_q",),
    "video.k_norm": ("attn1.norm_k",),
    "video.attention_out": ("attn1.to_out.0",),
    "video.feed_forward_norm": ("norm2.norm",),
    "video.feed_forward.up": ("ff.net.0.proj",),
    "video.feed_forward.down": ("ff.net.2",),
    "text.attention_norm": ("norm1.norm_enc",),
    "text.qkv": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
    "text.q_norm": ("attn1.norm_added_q",),
    "text.k_norm": ("attn1.norm_added_k",),
    "text.attention_out": ("attn1.to_add_out",),
    "text.feed_forward_norm": ("norm2.norm_enc",),
    "text.feed_forward.up": ("ff_enc.net.0.proj",),
    "text.feed_forward.down": ("ff_enc.net.2",),
}


def build(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> JointTransformer:
    """The transformer of published constructor settings, on the current default device, without weights.

    Raises UsageError for a setting that no published model has, and for lists of different lengths.
    """
    c = published_settings
    check_settings("denoiser of v1.5", c, {*DEFAULTS, *_NOT_SHAPING}, _SAME_IN_ALL)
    layers, sparsities = c["num_layers"], c["sparse_n"]
    for key in ("num_layers", "sparse_n"):
        if not isinstance(c[key], Sequence) or isinstance(c[key], str):
            raise UsageError(f"{key}={c[key]}: must be a list with a number for each stage")
    if len(layers) != len(sparsities):
        raise UsageError(f"num_layers={list(layers)} and sparse_n={list(sparsities)} must be as long as each other")
    stages = [
        Stage(blocks, "skiparse", k) if c["sparse1d"] and k != 1 else Stage(blocks)
        for blocks, k in zip(layers, sparsities, strict=True)
    ]
    return JointTransformer(stages, **settings_from_published(_SETTINGS, c))


def published_settings(model: JointTransformer) -> dict[str, Any]:
    """The published constructor settings of a transformer whose stages `joint_stages.held` has found fit."""
    stages = model.config.stages
    settings = settings_to_published(_SETTINGS, model.settings)
    settings |= {"num_layers": [stage.blocks for stage in stages], "sparse_n": [stage.k for stage in stages]}
    return settings | {"sparse1d": any(stage.k > 1 for stage in stages)} | _SAME_IN_ALL


def key_pairs(model: JointTransformer) -> Iterator[KeyPair]:
    """Every tensor of the transformer with its published key or keys."""
    c = model.config
    head = tuple(halves_first(c.rotary_parts))
    rows = tuple(number * c.head_dim + channel for number in range(c.heads) for channel in head)
    orders = {"qkv": (rows, rows, None), "q_norm": (head,), "k_norm": (head,)}
    blocks = [f"{stage}.{block}" for stage, size in enumerate(c.stages) for block in range(size.blocks)]
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        top, *rest = name.split(".")
        kind = rest[-1]
        if top == "blocks":
            inner = rest[1:-1]
            parts = _IN_BLOCK[".".join(inner)]
            shape = (shape[0] // len(parts), *shape[1:])
            theirs = tuple(f"transformer_blocks.{blocks[int(rest[0])]}.{part}.{kind}" for part in parts)
            yield KeyPair(name, theirs, shape, orders.get(inner[-1], ()))
        elif top in _SKIPS:
            yield KeyPair(name, (f"{_SKIPS[top]}.{rest[0]}.1.{kind}",), shape)
        else:
            if top == "patch" and kind == "weight":  # a convolution there
                shape = (shape[0], c.channels, c.patch_size, c.patch_size)
            yield KeyPair(name, (f"{_TOP[name.rpartition('.')[0]]}.{kind}",), shape)


def dead_keys(model: JointTransformer) -> dict[str, tuple[int, ...]]:
    """Keys and shapes that checkpoints merged from several ranks hold for the text that leaves the last block."""
    c = model.config
    last = f"transformer_blocks.{len(c.stages) - 1}.{c.stages[-1].blocks - 1}"
    return {
        f"{last}.attn1.to_add_out.weight": (c.width, c.width),
        f"{last}.attn1.to_add_out.bias": (c.width,),
        f"{last}.norm2.norm_enc.weight": (c.width,),
        f"{last}.norm2.norm_enc.bias": (c.width,),
        f"{last}.ff_enc.net.0.proj.weight": (4 * c.width, c.width),
        f"{last}.ff_enc.net.2.weight": (c.width, 4 * c.width),
    }


# Megatron's layers ask for entries `*_extra_state`, which are empty.
_READING = Reading(
    (
        'settings = {key: value for key, value in json.load(open("{folder}/config.json")).items() if key[0] != "_"}',
        "model = {name}(**settings)",
        f'weights = torch.load("{{folder}}/{TORCH}", map_location="cpu", weights_only=True)',
        "model.load_state_dict(weights, strict=False)",
    ),
    TORCH,
)

FAMILY = Family(
    "joint",
    JointTransformer,
    Layout(
        lambda _: "SparseUMMDiT",
        key_pairs,
        published_settings,
        dead_keys,
        held=held,
        further=lambda _model, _size: dict(_NOT_SHAPING),
        reading=lambda _: _READING,
    ),
    {"ummdit_v15": Kind(build, DEFAULTS, FULL_SIZES)},
)
