"""The quantized cache in a model. Oracle: transformers' DynamicCache, and the layer's own state token by token."""

import pytest
import torch
from architectures import TINY, tiny
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from lowbit import InputError, QuantizedCache
from lowbit.cache.blocks import PackedBlocks
from lowbit.cache.layer import QuantizedLayer
from lowbit.cache.scheme import CacheScheme
from lowbit.numerics.hadamard import Hadamard

IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(5))


def _generated(model: PreTrainedModel, cache: object, **options: object) -> Tensor:
    return model.generate(  # type: ignore[operator]
        IDS, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, **options
    )


@torch.no_grad()
def _decoded(model: PreTrainedModel, cache: object) -> Tensor:
    """Logits of a prompt of 20 tokens and of 20 more, in pieces of 1 and 3."""
    parts, start = [], 0
    for size in (20, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3):
        parts.append(model(input_ids=IDS[:, start : start + size], past_key_values=cache, use_cache=True).logits)
        start += size
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", TINY)
def test_a_cache_whose_window_covers_all_is_that_of_transformers(name: str) -> None:
    model = tiny(name)
    expected = _decoded(model, DynamicCache(config=model.config))
    assert torch.equal(_decoded(model, QuantizedCache(model.config, bits=2, window=64)), expected)


@pytest.mark.parametrize("name", TINY)
def test_eight_bits_without_a_window_stay_close_on_every_architecture(name: str) -> None:
    model = tiny(name)
    expected = _decoded(model, DynamicCache(config=model.config))
    cache = QuantizedCache(model.config, bits=8, group_size=4, window=0, sinks=1)
    found = _decoded(model, cache)
    assert torch.equal(found[:, :20], expected[:, :20])  # a prompt is read in float
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.03
    assert any(getattr(layer, "packed", None) is not None for layer in cache.layers)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "mistral"])
def test_generate_takes_it_with_greedy_search_and_beams(name: str) -> None:
    model = tiny(name)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        exact = QuantizedCache(model.config, window=64)
        assert torch.equal(_generated(model, exact, **options), _generated(model, None, **options))
        packed = QuantizedCache(model.config, bits=4, group_size=8, window=8)
        assert _generated(model, packed, **options).shape[1] == IDS.shape[1] + 12


def test_tokens_alone_and_in_groups_leave_the_same_state_and_see_the_same() -> None:
    keys, values = torch.randn(2, 1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    scheme = CacheScheme(bits=2, group=8, window=8, sinks=8)
    alone, grouped = QuantizedLayer(scheme), QuantizedLayer(scheme)
    for start in range(0, 64, 8):
        seen = grouped.update(keys[:, :, start : start + 8], values[:, :, start : start + 8])
        for token in range(start, start + 8):
            step = alone.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
            assert all(torch.equal(a, b[:, :, : token + 1]) for a, b in zip(step, seen, strict=True))
    assert alone.packed is not None
    assert grouped.packed is not None
    assert alone.packed[0].count == 6
    assert torch.equal(alone.packed[0].codes, grouped.packed[0].codes)
    assert torch.equal(alone.packed[1].scale, grouped.packed[1].scale)


@pytest.mark.parametrize(("bits", "per_value"), [(8, 9.0), (4, 5.0), (2, 3.0)])  # a code, and 2 x 16 bits per 32
def test_bytes_are_those_of_codes_scales_and_the_tokens_in_float(bits: int, per_value: float) -> None:
    layer = QuantizedLayer(CacheScheme(bits, 32, 32, 4))
    keys = torch.randn(1, 3, 4 + 32 * 9 + 5, 64, dtype=torch.bfloat16)
    layer.update(keys, keys)
    assert layer.packed is not None
    assert (layer.packed[0].count, layer.keys.shape[2]) == (8, 32 + 5)
    packed = int(2 * 3 * 64 * 8 * 32 * per_value / 8)
    assert layer.nbytes == packed + 2 * 3 * 64 * 2 * (4 + 32 + 5)
    assert layer.float_nbytes == 2 * keys.nbytes


def test_a_sliding_layer_forgets_what_its_window_passed() -> None:
    layer = QuantizedLayer(CacheScheme(4, 4, 4, 2), sliding_window=16)
    keys = torch.arange(60.0).view(1, 1, 60, 1).expand(1, 1, 60, 8)
    for token in range(60):
        length, offset = layer.get_mask_sizes(1)
        seen, _ = layer.update(keys[:, :, token : token + 1], keys[:, :, token : token + 1])
        assert (seen.shape[2], offset) == (length, max(token - 15, 0))
        assert (seen[0, 0, :, 0] - torch.arange(offset, token + 1)).abs().max() < 0.3
    assert layer.nbytes < 0.5 * 2 * 4 * keys.numel()
    assert layer.seen - layer.dropped < 16 + 4


@pytest.mark.parametrize("removed", [0, 1, 5, 17, 45, 47, 50])
def test_crop_takes_tokens_back_even_from_packed_blocks_and_sinks(removed: int) -> None:
    keys = torch.arange(50.0).view(1, 1, 50, 1).expand(1, 1, 50, 8)
    layer = QuantizedLayer(CacheScheme(8, 8, 8, 4))
    layer.update(keys, keys)
    layer.crop(-removed)
    assert layer.get_seq_length() == 50 - removed
    seen, _ = layer.update(keys[:, :, 50 - removed :], keys[:, :, 50 - removed :]) if removed else layer._decoded()
    assert (seen - keys).abs().max() < 0.05


def test_assisted_decoding_runs_with_it() -> None:
    model = tiny("gemma3_text")
    cache = QuantizedCache(model.config, window=64)
    ids = IDS[:1]
    expected = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    found = model.generate(
        ids, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=12, min_new_tokens=12, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_rows_of_a_batch_can_be_reordered_repeated_and_chosen() -> None:
    x = torch.randn(2, 1, 40, 8, generator=torch.Generator().manual_seed(1))
    layer = QuantizedLayer(CacheScheme(4, 8, 8, 2))
    layer.update(x, x)
    before = layer._decoded()[0]
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer._decoded()[0], before[[1, 0]])
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(layer._decoded()[0], before[[1, 0]])
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes) == (0, 0)


def test_a_head_size_that_no_group_divides_gets_smaller_groups() -> None:
    x = torch.randn(1, 1, 4, 2, 80)
    layer = QuantizedLayer(CacheScheme(4, 32, 0, 0))
    layer.update(x[0].expand(1, 4, 2, 80).repeat(1, 1, 16, 1), x[0].expand(1, 4, 2, 80).repeat(1, 1, 16, 1))
    assert layer.packed is not None
    assert layer.packed[1].group == 20
    assert isinstance(layer.packed[1], PackedBlocks)


KEYS = [{"token_keys": t, "rotate_keys": r} for t in (False, True) for r in (False, True)]


@pytest.mark.parametrize("options", KEYS, ids=["channels", "channels, R3", "tokens", "tokens, R3"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3"])
def test_attention_is_that_of_transformers_however_keys_are_packed(name: str, options: dict[str, bool]) -> None:
    model = tiny(name)
    expected = _decoded(model, DynamicCache(config=model.config))
    whole = QuantizedCache(model.config, bits=2, window=64, **options)
    assert torch.equal(_decoded(model, whole), expected)
    packed = QuantizedCache(model.config, bits=8, group_size=4, window=0, sinks=1, **options)
    assert 0 < (_decoded(model, packed) - expected).norm() / expected.norm() < 0.03
    assert _generated(model, QuantizedCache(model.config, group_size=8, window=8, **options)).shape[1] == 52


def test_turned_keys_give_the_products_of_turned_queries_with_turned_keys() -> None:
    """R3 as it is written: (q Q) . Q's codes of (k Q), with a matrix of our own."""
    keys, queries = torch.randn(2, 1, 1, 64, 32, generator=torch.Generator().manual_seed(4))
    layer = QuantizedLayer(CacheScheme(4, 32, 0, 0, token_keys=True, rotate_keys=True))
    layer.update(keys, keys)
    turn = Hadamard.of(32).apply(torch.eye(32))
    packed = PackedBlocks.encode((keys @ turn).unflatten(2, (2, 32)), 4, 32).decode(torch.float32).flatten(2, 3)
    found = queries @ layer._decoded()[0].transpose(-1, -2)
    assert torch.allclose(found, (queries @ turn) @ packed.transpose(-1, -2), atol=1e-4)


def test_rotation_pays_where_one_channel_of_the_keys_is_large() -> None:
    keys = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(6))
    keys[..., 9] += 30 * torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(7))
    errors = {}
    for rotate_keys in (False, True):
        layer = QuantizedLayer(CacheScheme(4, 64, 0, 0, token_keys=True, rotate_keys=rotate_keys))
        layer.update(keys, keys)
        errors[rotate_keys] = (layer._decoded()[0] - keys).square().mean().item()
    assert errors[True] < 0.5 * errors[False]


def test_turned_keys_of_packed_blocks_come_back_when_tokens_are_taken_back() -> None:
    keys = torch.randn(1, 1, 50, 16, generator=torch.Generator().manual_seed(8))
    layer = QuantizedLayer(CacheScheme(8, 8, 8, 4, token_keys=True, rotate_keys=True))
    layer.update(keys, keys)
    layer.crop(-30)
    assert (layer._decoded()[0] - keys[:, :, :20]).abs().max() < 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1}, "can have 2 to 8 bits, not 1"),
        ({"group_size": 0}, "a group has at least one token"),
        ({"window": -1}, "no number is negative"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        QuantizedCache(LlamaConfig(num_hidden_layers=2), **options)


def test_models_with_other_states_and_things_that_are_no_config_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match=r"give model\.config"):
        QuantizedCache(model)  # type: ignore[arg-type]
    hybrid = LlamaConfig(num_hidden_layers=2)
    hybrid.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(InputError, match=r"layer 0 keeps a LinearAttentionLayer .* use transformers.DynamicCache"):
        QuantizedCache(hybrid)


def test_keys_that_float16_can_not_hold_are_refused_with_what_to_do() -> None:
    layer = QuantizedLayer(CacheScheme(4, 8, 0, 0))
    with pytest.raises(InputError, match="some keys are NaN, infinite or beyond 65504"):
        layer.update(torch.full((1, 1, 8, 8), 1e6), torch.ones(1, 1, 8, 8))


def test_taking_back_more_than_a_passed_window_holds_is_refused() -> None:
    x = torch.randn(1, 1, 40, 8)
    layer = QuantizedLayer(CacheScheme(4, 4, 4, 0), sliding_window=8)
    layer.update(x, x)
    with pytest.raises(InputError, match="the window slid on; call activate_past_recording"):
        layer.crop(-20)
    with pytest.raises(InputError, match="negative"):
        layer.crop(3)
