"""The memory of a training step, counted without memory."""

import pytest
import torch

from osp.denoiser import CrossTransformer
from osp.denoiser.flops import denoiser_flops
from osp.devices.live import LiveBytes
from osp.diffusion import Flow
from osp.errors import UsageError
from osp.training.memory.layout import Layout
from osp.training.memory.rehearsal import ACTIVATIONS, COPIES, GRADIENTS, KINDS, WAITING, Rehearsal, rehearse_denoiser

LATENT, WORDS = (2, 3, 8, 8), 8


def model() -> CrossTransformer:
    with torch.device("meta"):
        return CrossTransformer(
            stages=[{"blocks": 3, "pattern": "skiparse", "k": 2}], heads=2, head_dim=12, channels=4, out_channels=4,
            text_channels=16,
        )  # fmt: skip


def rehearsed(recompute_every: int = 0, precision: str = "32-true", offloads: bool = False) -> Rehearsal:
    return rehearse_denoiser(model(), None, Flow(), LATENT, WORDS, recompute_every, precision, True, offloads)


def test_live_bytes_follow_tensors_until_they_are_gone() -> None:
    with LiveBytes() as live:
        kept = torch.empty(100, device="meta")
        passing = torch.empty(50, device="meta")
        live.kind = "others"
        view = kept[:10]
        assert (live.now, live.peak) == (600, 600)
        live.rename(passing, "named")
        assert live.kinds["named"] == 200
        del passing
        assert (live.now, live.peak) == (400, 600)
        del kept
        assert live.now == 400  # the view holds it
        del view
    assert live.now == 0


def test_operations_are_those_that_are_counted_from_the_layers() -> None:
    counted = denoiser_flops(model(), LATENT[1:], WORDS, LATENT[0])
    assert rehearsed().flops == counted.forward + counted.backward


def test_recomputing_keeps_less_and_computes_the_blocks_once_more() -> None:
    plain, again = rehearsed(), rehearsed(recompute_every=1)
    assert list(again.kept) == list(plain.kept) == ["block 0", "block 1", "block 2"]
    tokens = 2 * 3 * 4 * 4 * 24 * 4
    assert again.kept["block 1"] == tokens  # the block's input
    assert plain.kept["block 1"] > 10 * tokens
    assert again.peak({})[ACTIVATIONS] < plain.peak({})[ACTIVATIONS]
    assert again.flops > plain.flops


def test_inputs_of_blocks_wait_on_the_cpu_until_the_blocks_are_computed_again() -> None:
    again, waiting = (rehearsed(1, offloads=offloads).timeline for offloads in (False, True))
    tokens = 2 * 3 * 4 * 4 * 24 * 4
    assert waiting[:, KINDS.index(WAITING)].max() == 2 * tokens  # all but the first, which a long skip may take too
    assert waiting.sum(axis=1).max() == again.sum(axis=1).max()
    assert set(waiting[:, KINDS.index(WAITING)]) == {0, tokens, 2 * tokens}


def test_shares_of_gradients_and_tokens_move_the_peak() -> None:
    whole = rehearsed().peak({})
    shared = rehearsed().peak({ACTIVATIONS: 0.5, GRADIENTS: 0.25})
    assert sum(shared.values()) < sum(whole.values())


def test_gradients_at_the_end_are_those_of_all_weights() -> None:
    only = rehearsed().peak({ACTIVATIONS: 0.0, "activations outside the blocks": 0.0, COPIES: 0.0})
    weights = 4 * sum(parameter.numel() for parameter in model().parameters())
    assert only[GRADIENTS] == pytest.approx(weights, rel=0.01)


def test_half_precision_holds_copies_of_the_weights_until_they_are_recomputed() -> None:
    plain, again = (rehearsed(every, "bf16-mixed").timeline[:, KINDS.index(COPIES)].max() for every in (0, 1))
    parameters = sum(one.numel() for one in model().parameters())
    of_blocks = sum(one.numel() for one in model().blocks.parameters() if one.ndim == 2)
    assert 2 * of_blocks <= plain <= 2 * parameters
    assert again <= plain - 2 * of_blocks * 0.6  # those of one of the three blocks are there


def test_a_rehearsal_leaves_nothing_fake_behind() -> None:
    rehearsed()
    real = CrossTransformer(
        stages=[{"blocks": 1, "pattern": "skiparse", "k": 2}], heads=2, head_dim=12, channels=4, out_channels=4,
        text_channels=16,
    )  # fmt: skip
    out = real(torch.randn(2, 4, 3, 8, 8), torch.zeros(2), torch.randn(2, WORDS, 16))
    assert type(out) is torch.Tensor
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("trainer", "devices", "wanted"),
    [
        ({"devices": 1, "strategy": "auto"}, None, Layout()),
        ({"devices": -1, "strategy": "ddp"}, None, Layout(8, "ddp")),
        ({"devices": 2, "num_nodes": 2, "strategy": "ddp"}, None, Layout(4, "ddp", nodes=2)),
        (
            {"strategy": {"_target_": "osp.parallel.ShardedStrategy", "sequence": 2, "replicas": None}, "num_nodes": 2},
            16,
            Layout(16, "fsdp", 2, 2, nodes=2),
        ),
        ({"strategy": {"_target_": "osp.parallel.ShardedStrategy"}}, 32, Layout(32, "fsdp", 1, 4, nodes=4)),
    ],
)
def test_a_layout_is_read_from_the_trainer(trainer: dict[str, object], devices: int | None, wanted: Layout) -> None:
    assert Layout.of(trainer, devices, here=8) == wanted


def test_what_devices_send_stays_in_a_machine_as_far_as_it_can() -> None:
    assert Layout(8, "ddp").sent(800, 1) == (1400, 0)
    assert Layout(16, "ddp", nodes=2).sent(800, 1) == (1400, 100)
    copies, whole = (Layout(16, "fsdp", replicas=copies, nodes=2) for copies in (2, 1))
    assert copies.sent(800, 2) == (6 * 700, 100)
    assert whole.sent(800, 2) == (6 * 700, 6 * 50)


def test_devices_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"trainer.strategy.sequence=3: must divide the 8 devices"):
        Layout(8, "fsdp", sequence=3)
