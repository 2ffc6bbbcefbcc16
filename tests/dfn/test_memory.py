"""The persistent memory: merging, decay, eviction, causality, checkpoints, and a task that needs it."""

import io

import pytest
import torch
from helpers import same_bits, unlike_at_the_start
from torch import nn

from dfn.models.language import DFNLanguageModel
from dfn.models.memory import FAR, MemoryState, PersistentFieldMemory
from dfn.studies.memory_task import CONFIG, two_segments


def written(memory, positions, influence=None, states=None):
    p = torch.tensor(positions)[None]
    s = p if states is None else torch.tensor(states)[None]
    w = None if influence is None else torch.tensor(influence)[None]
    return memory.write(memory.initial_state(1), p, s, w)


def alive(state):
    return [(p.tolist(), w.item()) for p, w in zip(state.positions[0], state.influence[0], strict=True) if w > 0]


def test_merges_into_the_nearest_by_weight():
    memory = PersistentFieldMemory(4, 1, 2, decay=1.0, merge_radius=0.5)
    state = written(memory, [[0.0, 0.0], [3.0, 0.0]], [1.0, 2.0], [[1.0], [2.0]])
    state = memory.write(state, torch.tensor([[[3.3, 0.0]]]), torch.tensor([[[5.0]]]), torch.tensor([[4.0]]))
    torch.testing.assert_close(state.influence.sort(descending=True).values, torch.tensor([[6.0, 1.0, 0.0, 0.0]]))
    heavy = state.influence[0].argmax()
    torch.testing.assert_close(state.positions[0, heavy], torch.tensor([3.2, 0.0]))
    torch.testing.assert_close(state.states[0, heavy], torch.tensor([4.0]))


def test_merges_along_chains_and_never_further():
    memory = PersistentFieldMemory(8, 1, 1, decay=1.0, merge_radius=0.5)
    state = written(memory, [[0.0], [0.4], [0.8], [1.5], [9.0]])
    found = sorted(alive(state))
    assert [w for _, w in found] == [3.0, 1.0, 1.0]
    torch.testing.assert_close(found[0][0][0], 0.4, rtol=1e-5, atol=1e-6)


def test_influence_is_conserved_decays_and_decides_who_stays():
    memory = PersistentFieldMemory(5, 3, 2, decay=0.5, merge_radius=0.1)
    state = memory.write(memory.initial_state(2), torch.rand(2, 4, 2), torch.rand(2, 4, 3), torch.rand(2, 4))
    before = state.influence.sum(1)
    state = memory.write(state, torch.rand(2, 0, 2), torch.rand(2, 0, 3), torch.rand(2, 0))
    torch.testing.assert_close(state.influence.sum(1), before / 2)
    memory = PersistentFieldMemory(2, 1, 1, decay=0.5, merge_radius=0.0)
    state = written(memory, [[1.0], [2.0], [3.0], [4.0]], [0.1, 8.0, 0.2, 4.0])
    assert alive(state) == [([2.0], 8.0), ([4.0], 4.0)]
    state = memory.write(state, torch.tensor([[[5.0]]]), torch.zeros(1, 1, 1), torch.tensor([[3.0]]))
    assert alive(state) == [([2.0], 4.0), ([5.0], 3.0)]  # 4 had decayed to 2
    state = memory.write(state, torch.tensor([[[6.0], [7.0]]]), torch.zeros(1, 2, 1), torch.full((1, 2), 2.0))
    assert alive(state) == [([6.0], 2.0), ([7.0], 2.0)]  # of equals the later ones


def test_nothing_is_written_with_no_influence_and_inputs_stay():
    memory = PersistentFieldMemory(3, 2, 2)
    state = memory.initial_state(2)
    copy = MemoryState(*(x.clone() for x in state))
    p, s, w = torch.rand(2, 5, 2), torch.rand(2, 5, 2), torch.zeros(2, 5)
    new = memory.write(state, p, s, w)
    assert new.influence.eq(0).all() and new.positions.eq(FAR).all()
    for a, b in zip(state, copy, strict=True):
        assert torch.equal(a, b)
    assert memory.read(new, p, 1.0).eq(0).all()


def test_reads_the_neighbourhood():
    memory = PersistentFieldMemory(6, 1, 1, merge_radius=0.0)
    state = written(memory, [[0.0], [1.0], [50.0]], [1.0, 3.0, 1.0], [[2.0], [4.0], [9.0]])
    found = memory.read(state, torch.tensor([[[0.5], [50.0]]]), 1.0, k=4)
    torch.testing.assert_close(found, torch.tensor([[[3.5], [9.0]]]))


def test_gradients_within_a_segment_and_none_after_detach():
    memory = PersistentFieldMemory(6, 3, 2)
    p, s, w = (torch.rand(2, 5, 2, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True),
               torch.rand(2, 5, requires_grad=True))  # fmt: skip
    state = memory.write(memory.initial_state(2), p, s, w)
    memory.read(state, torch.rand(2, 4, 2), 0.5).square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in (p, s, w))
    assert not any(x.requires_grad for x in state.detach())


def test_survives_a_checkpoint():
    memory = PersistentFieldMemory(6, 3, 2)
    state = memory.write(memory.initial_state(2), torch.rand(2, 9, 2), torch.randn(2, 9, 3), torch.rand(2, 9))
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    back = MemoryState(**torch.load(file, weights_only=True))
    assert all(same_bits(a, b) for a, b in zip(state, back, strict=True))
    assert memory.state_dict() == {}


def test_an_empty_memory_changes_nothing_and_a_far_entity_neither():
    torch.manual_seed(0)
    block = DFNLanguageModel(16, 24, 1, pos_dim=3).blocks[0]
    states, positions = torch.randn(2, 13, 24), torch.randn(2, 4, 13, 3)
    plain = block(states, positions)
    empty = PersistentFieldMemory(5, 24, 12).initial_state(2)
    for memory in (None, empty):
        found = block(states, positions, memory=memory)
        torch.testing.assert_close(found[0], plain[0])
        torch.testing.assert_close(found[1], plain[1])


def test_memory_is_read_as_more_entities():
    """A memory of what came before, and the sequence alone, as attention over both."""
    torch.manual_seed(0)
    attention = DFNLanguageModel(16, 24, 1, pos_dim=3, k=64).blocks[0].attention
    states, positions = torch.randn(1, 20, 24), torch.randn(1, 4, 20, 3)
    whole, drift = attention(states, positions)
    held = drift.positions[:, :, :12].transpose(1, 2).flatten(2)
    memory = MemoryState(held, states[:, :12], torch.ones(1, 12))
    late, _ = attention(states[:, 12:], positions[:, :, 12:], memory=memory)
    torch.testing.assert_close(late, whole[:, 12:], rtol=1e-4, atol=1e-5)


def test_model_is_causal_across_segments_to_the_bit():
    model = unlike_at_the_start(DFNLanguageModel(31, 24, 2, pos_dim=3, memory_size=20)).eval()
    with torch.no_grad():
        _, memory = model(torch.randint(31, (2, 17)))
        ids = torch.randint(31, (2, 23))
        other = ids.clone()
        other[:, 11:] = torch.randint(31, (2, 12))
        a, after = model(ids, memory)
        b, _ = model(other, memory)
        empty, _ = model(ids)
    assert same_bits(a[:, :11], b[:, :11]) and not same_bits(a[:, 11:], b[:, 11:])
    assert not torch.allclose(a, empty), "the memory is not read"
    assert after.positions.shape == (2, 20, 12) and not any(x.requires_grad for x in after)


def test_time_goes_on_between_segments():
    """One layer, no merging: three parts with a memory give what the whole gives, for temporal and semantic heads."""
    torch.manual_seed(0)
    model = DFNLanguageModel(31, 24, 1, k=64, memory_size=40).eval()
    model.memory.decay, model.memory.merge_radius = 1.0, 0.0
    ids = torch.arange(24)[None]
    block = model.blocks[0]
    with torch.no_grad():
        states = model.embed(ids)
        whole = block.attention(block.said(states), model.positions(states))[0]
        _, memory = model(ids[:, :6])
        _, memory = model(ids[:, 6:14], memory)
        late = model.embed(ids[:, 14:])
        found, _ = block.attention(block.said(late), model.positions(late), memory=memory)
    torch.testing.assert_close(found, whole[:, 14:], rtol=1e-3, atol=1e-4)


def accuracy_in_the_second_segment(remember: bool) -> tuple[float, float]:
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(3)
    model = DFNLanguageModel(**CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(301):
        first, first_targets, second, second_targets = two_segments(48 if step < 300 else 500, generator)
        a, memory = model(first)
        b, _ = model(second, memory if remember else None)
        targets = torch.cat([first_targets, second_targets], 1).flatten()
        loss = nn.functional.cross_entropy(torch.cat([a, b], 1).flatten(0, 1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    known = first_targets >= 0
    return tuple((x.argmax(-1) == t)[m].float().mean().item() for x, t, m in
                 ((a, first_targets, known), (b, second_targets, second_targets >= 0)))  # fmt: skip


def test_a_task_that_needs_memory(one_thread):
    first, second = accuracy_in_the_second_segment(remember=True)
    assert first > 0.95 and second > 0.95
    first, second = accuracy_in_the_second_segment(remember=False)
    assert first > 0.9 and second < 0.4  # guessing one of four: 0.25


def test_errors_name_the_argument():
    memory = PersistentFieldMemory(4, 3, 2)
    state = memory.initial_state(2)
    with pytest.raises(ValueError, match=r"states must have shape \[2, 5, 3\], got \[2, 5, 4\]"):
        memory.write(state, torch.rand(2, 5, 2), torch.rand(2, 5, 4), torch.rand(2, 5))
    with pytest.raises(ValueError, match=r"positions must have shape \[2, 5, 2\], got \[3, 5, 2\]"):
        memory.write(state, torch.rand(3, 5, 2), torch.rand(3, 5, 3))
    with pytest.raises(ValueError, match="decay must be above 0 and at most 1, got 0"):
        PersistentFieldMemory(4, 3, decay=0)
    with pytest.raises(ValueError, match="size must be an integer of at least 1, got 0"):
        PersistentFieldMemory(0, 3)


def test_influence_decays_without_a_floor():
    """Down to the least number there is, what is held stays where it is and what it is."""
    memory = PersistentFieldMemory(3, 2, 1, decay=0.5)
    state = memory.write(memory.initial_state(1), torch.tensor([[[7.0]]]), torch.tensor([[[2.0, 3.0]]]))
    for _ in range(140):
        state = memory.write(state, torch.full((1, 1, 1), -9.0), torch.zeros(1, 1, 2), torch.zeros(1, 1))
    assert 0 < state.influence.max() < 1e-40
    held = state.influence[0].argmax()
    assert state.positions[0, held].tolist() == [7.0] and state.states[0, held].tolist() == [2.0, 3.0]
