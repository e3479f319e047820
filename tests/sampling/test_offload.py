"""Blocks that are on the device only while they run."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from osp.errors import Stopped
from osp.sampling import VideoGenerator, offload
from osp.sampling.offload import BLOCKS_ON_DEVICE, offloaded

Make = Callable[..., VideoGenerator]


def test_offloaded_blocks_compute_the_same_bits_and_come_back(make_generator: Make) -> None:
    denoiser = make_generator("joint").denoiser
    inputs = torch.randn(2, 4, 3, 4, 6), torch.rand(2), torch.randn(2, 5, 16), None, torch.randn(2, 16)
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    copies: list[int] = []

    def count(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # Weights in use are copies; those of the others are at home.
            copies.append(sum(homes[i] != block.video.qkv.weight.data_ptr() for i, block in enumerate(denoiser.blocks)))

        return hook

    with torch.no_grad():
        wanted = denoiser(*inputs)
        homes = [block.video.qkv.weight.data_ptr() for block in denoiser.blocks]
        hooks = [block.video.qkv.register_forward_hook(count(i)) for i, block in enumerate(denoiser.blocks)]
        with offloaded(denoiser, torch.device("cpu")):
            assert torch.equal(denoiser(*inputs), wanted)
            assert torch.equal(denoiser(*inputs), wanted)
        for hook in hooks:
            hook.remove()
    assert copies == [1] * 2 * len(denoiser.blocks)
    assert [block.video.qkv.weight.data_ptr() for block in denoiser.blocks] == homes
    for key, value in denoiser.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in denoiser.blocks)


def test_on_an_accelerator_the_next_block_is_on_its_way_and_no_more_than_three_are_there(
    make_generator: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of copies, waits and drops, on a device that only notes them."""
    notes: list[str] = []

    def event() -> SimpleNamespace:
        number = sum(note.startswith("end") for note in notes)
        notes.append(f"end {number}")
        return SimpleNamespace(synchronize=lambda: notes.append(f"wait for {number}"))

    current = SimpleNamespace(wait_stream=lambda stream: notes.append("copied"), record_event=event)
    device = SimpleNamespace(current_stream=lambda device: current, stream=lambda stream: nullcontext())
    monkeypatch.setattr(offload, "backend", lambda _: device)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    denoiser = make_generator("cross").denoiser
    blocks = offload._Blocks(denoiser.blocks, torch.device("cpu"))
    blocks.stream = object()
    homes = [block.table.data_ptr() for block in denoiser.blocks]
    held = []
    for call in range(2):
        for index, block in enumerate(denoiser.blocks):
            blocks.before(index)
            here = [i for i, other in enumerate(denoiser.blocks) if other.table.data_ptr() != homes[i]]
            assert here == sorted({index, (index + 1) % 3})
            done = sum(note.startswith("wait for") for note in notes)
            held.append(3 * call + index - done + 2)  # those that may not be done, this one and the next
            blocks.after(index)
            assert block.table.data_ptr() == homes[index]
    assert max(held) == BLOCKS_ON_DEVICE
    assert [note for note in notes if note.startswith("wait for")] == [f"wait for {i}" for i in range(4)]
    assert notes.count("copied") == 6
    blocks.clear()
    assert [block.table.data_ptr() for block in denoiser.blocks] == homes


def test_work_that_ends_early_leaves_the_weights_at_home(make_generator: Make) -> None:
    denoiser = make_generator("joint").denoiser
    inputs = torch.randn(1, 4, 3, 4, 6), torch.rand(1), torch.randn(1, 5, 16), None, torch.randn(1, 16)
    homes = [value.data_ptr() for value in denoiser.parameters()]
    hook = denoiser.blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(Stopped()))
    with torch.no_grad():
        with pytest.raises(Stopped), offloaded(denoiser, torch.device("cpu")):
            denoiser(*inputs)
        hook.remove()
        assert [value.data_ptr() for value in denoiser.parameters()] == homes
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in denoiser.blocks)
        wanted = denoiser(*inputs)
        with offloaded(denoiser, torch.device("cpu")):
            assert torch.equal(denoiser(*inputs), wanted)
