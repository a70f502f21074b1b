"""Captions of different numbers of tokens: stored as they are, padded in the batch, and no reason to part rows."""

import pytest
import torch
from helpers.data_cases import SINGLE_PROCESS, data_config, dataset_with, sample_of
from helpers.data_families import VariableLength
from helpers.project import BASE, reset_accelerate

from common.errors import DataError
from data.batches import make_batch
from data.precompute.build import build_datasets
from data.samples import PlannedSample
from data.schedule import random_key
from data.sources.comfy_writer import write_folder
from data.store.keys import key_of
from models.config import ModelConfig
from models.families.sd15 import StableDiffusion
from objectives.config import ObjectiveConfig
from training.loss import build_loss

LENGTHS = (2, 5, 1, 3)
EMPTY = 1


def conds(**more) -> dict:
    """Captions c0, c1, ... of LENGTHS tokens, and the empty one; token t of caption c is all 10 c + t."""
    return {
        key_of(f"c{c}" if c else ""): {
            "prompt_embeds": tokens(c, n),
            **{name: of(c, n) for name, of in more.items()},
        }
        for c, n in enumerate((EMPTY, *LENGTHS))
    }


def tokens(caption: int, count: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (10 * caption + torch.arange(count).to(dtype))[:, None].repeat(1, 3)


def rows(
    dropout: float = 0.0, texts: tuple[tuple[int, ...], ...] = ((1,), (2,), (3,), (4,))
) -> list[PlannedSample]:
    return [
        sample_of(
            i,
            caption_keys=[key_of(f"c{c}") for c in of_row],
            caption_probabilities=[1.0] * len(of_row),
            caption_dropout=dropout,
        )
        for i, of_row in enumerate(texts)
    ]


def media(count: int = 4) -> dict:
    return {
        key_of(f"media {i}"): {"latents": torch.full((4, 2, 2), float(i))} for i in range(count)
    }


@pytest.mark.parametrize("fixed", [None, 5, 8])
def test_captions_are_padded_to_the_longest_or_to_a_fixed_length(tmp_path, fixed):
    dataset = dataset_with(tmp_path, rows(), media(), conds(), {"prompt_embeds": fixed})
    assert len(dataset.buckets) == 1, "their lengths do not part them"
    order = [int(dataset.latents(row)[0, 0, 0]) for row in range(4)]
    for chosen in ([0, 1, 2, 3], [2], [3, 0, 0]):
        batch = make_batch(dataset, chosen, chosen, range(len(chosen)))
        lengths = [LENGTHS[order[row]] for row in chosen]
        embeds, mask = batch.cond["prompt_embeds"], batch.cond["attention_mask"]
        assert embeds.shape == (len(chosen), fixed or max(lengths), 3)
        assert (embeds.dtype, mask.dtype) == (torch.bfloat16, torch.bool)
        assert batch.to(torch.device("meta")).cond["lengths"] == tuple(lengths), (
            "they stay where they are"
        )
        for one, seen, row, length in zip(embeds, mask, chosen, lengths, strict=True):
            assert one[:length].equal(tokens(1 + order[row], length))
            assert dataset.cond(row)["prompt_embeds"].equal(one[:length])
            assert not one[length:].any()
            assert seen.tolist() == [True] * length + [False] * (len(one) - length)


def test_rows_may_have_a_mask_of_their_own_and_tensors_that_are_not_ragged(tmp_path):
    texts = conds(
        attention_mask=lambda c, n: torch.tensor([1] * (n - 1) + [0]),
        pooled=lambda c, n: torch.full((2,), c),
    )
    dataset = dataset_with(tmp_path, rows(0.5), media(), texts, {"prompt_embeds": None})
    assert len(dataset.buckets) == 1
    assert dataset.samples["caption_dropout"].tolist() == [0.5] * 4
    batch = make_batch(dataset, [0, 1, 2, 3], [0, 1, 2, 3], range(4), torch.full((4,), 0.5))
    order = [int(value) for value in batch.latents[:, 0, 0, 0]]
    assert batch.cond["attention_mask"].sum(1).tolist() == [LENGTHS[i] - 1 for i in order]
    assert batch.cond["attention_mask"].shape == (4, 5)
    assert batch.cond["pooled"].tolist() == [[1 + i] * 2 for i in order]


def test_several_tensors_are_ragged_each_by_itself(tmp_path):
    texts = conds(more=lambda c, n: torch.ones(2 * n, 4), ids=lambda c, n: torch.arange(n))
    dataset = dataset_with(
        tmp_path, rows(), media(), texts, {"prompt_embeds": None, "more": 12, "ids": None}
    )
    batch = make_batch(dataset, [0, 1], [0, 1], range(2), torch.full((2,), 0.5))
    longest = batch.cond["prompt_embeds"].shape[1]
    assert batch.cond["more"].shape == (2, 12, 4)
    assert batch.cond["ids"].shape == (2, longest)
    assert batch.cond["attention_mask"].shape == (2, longest), "of the first"


def test_the_empty_prompt_and_variants_may_have_other_lengths(tmp_path):
    dataset = dataset_with(
        tmp_path, rows(0.3, ((1, 2), (3, 4))), media(2), conds(), {"prompt_embeds": None}
    )
    assert len(dataset.buckets) == 1
    assert dataset.samples["caption_dropout"].tolist() == pytest.approx([0.3] * 2)
    seen = set()
    for seed in range(60):
        batch = make_batch(
            dataset, [0, 1], [random_key("a", seed), random_key("b", seed)], range(2)
        )
        seen |= {
            (int(e[0, 0]) // 10, int(m.sum()))
            for e, m in zip(batch.cond["prompt_embeds"], batch.cond["attention_mask"], strict=True)
        }
    assert seen == {(c, n) for c, n in enumerate((EMPTY, *LENGTHS))}


@pytest.mark.parametrize("what", ["width", "dtype", "names"])
def test_what_truly_differs_parts_rows_and_is_never_dropped(tmp_path, what):
    texts = conds()
    odd = {
        "width": torch.zeros(2, 4).bfloat16(),
        "dtype": torch.zeros(2, 3),
        "names": tokens(2, 5),
    }[what]
    texts[key_of("c2")] = {"prompt_embeds": odd} | (
        {"pooled": torch.zeros(2)} if what == "names" else {}
    )
    dataset = dataset_with(tmp_path, rows(0.5), media(), texts, {"prompt_embeds": None})
    assert sorted(sum(s.count for s in bucket) for bucket in dataset.buckets) == [1, 3]
    assert sorted(dataset.samples["caption_dropout"].tolist()) == [0, 0.5, 0.5, 0.5]


def test_without_ragged_tensors_lengths_part_rows_as_before(tmp_path):
    dataset = dataset_with(tmp_path, rows(0.5), media(), conds())
    assert len(dataset.buckets) == 4
    assert sorted(dataset.samples["caption_dropout"].tolist()) == [0, 0, 0, 0.5], (
        "that of one token is like the empty prompt"
    )
    batch = make_batch(dataset, [0], [0], range(1))
    assert batch.cond.keys() == {"prompt_embeds"}


def test_no_tokens_are_one_of_padding(tmp_path):
    texts = {key_of(text): {"prompt_embeds": torch.zeros(0, 3)} for text in ("", "c1")}
    dataset = dataset_with(tmp_path, rows(0.0, ((1,),)), media(1), texts, {"prompt_embeds": None})
    cond = make_batch(dataset, [0, 0], [0, 1], range(2)).cond
    assert cond["prompt_embeds"].equal(torch.zeros(2, 1, 3))
    assert not cond["attention_mask"].any()


def test_more_tokens_than_the_fixed_length_are_refused(tmp_path):
    dataset = dataset_with(tmp_path, rows(), media(), conds(), {"prompt_embeds": 4})
    with pytest.raises(
        DataError, match=r"prompt_embeds of one batch differ: \(4, 3\) .* at most and \(5, 3\)"
    ):
        make_batch(dataset, [0, 1, 2, 3], [0, 1, 2, 3], range(4))


@pytest.fixture
def built(images, tmp_path):
    """The four images with captions of other lengths, through the whole of precompute."""
    (images / "cat.txt").write_text("a")
    (images / "dog.txt").write_text("a long caption of many words\none")

    def build(family, **options):
        reset_accelerate()
        given = {
            "resolution": 64,
            "cache_dir": str(tmp_path / "cache"),
            "path": str(images),
            **options,
        }
        return build_datasets(data_config(**given), family, SINGLE_PROCESS).train

    yield build
    reset_accelerate()


def test_a_batch_trains_on_each_caption_as_if_it_were_alone(built):
    family = VariableLength(ModelConfig(path=str(BASE)))
    dataset = built(family, caption_dropout=0.4, caption_one_per_line=True)
    assert len(dataset.buckets) == 1
    assert len({len(dataset.cond(row)["prompt_embeds"]) for row in range(4)}) > 2
    plain = built(StableDiffusion(family.config))
    assert stored_bytes(dataset) < stored_bytes(plain), (
        "padding takes no room, though there is the empty prompt too"
    )
    denoiser = family.load_denoiser(torch.float32)
    loss = build_loss(family, ObjectiveConfig(), "MSE", torch.float32)
    chosen, seeds = [0, 1, 2, 3] * 2, [random_key("sample", 0, i) for i in range(8)]
    batch = make_batch(dataset, chosen, seeds, range(8))
    together = loss(denoiser, batch)
    singles = [
        make_batch(dataset, [row], [seed], range(1))
        for row, seed in zip(chosen, seeds, strict=True)
    ]
    assert len({one.cond["prompt_embeds"].shape[1] for one in singles}) > 2
    torch.testing.assert_close(
        together, torch.cat([loss(denoiser, one) for one in singles]), rtol=1e-4, atol=1e-5
    )
    batch.cond["attention_mask"] = torch.ones_like(batch.cond["attention_mask"])
    assert not torch.allclose(loss(denoiser, batch), together, rtol=1e-4, atol=1e-5), (
        "the mask counts"
    )


def stored_bytes(dataset) -> int:
    stored = [dataset.text.locate(number << 32).shard for number in range(len(dataset.text.shards))]
    return sum(int(shard.columns["prompt_embeds"].num_bytes.sum()) for shard in stored)


def test_comfyui_captions_of_all_lengths_share_batches(built, tmp_path):
    family, none = VariableLength(ModelConfig(path=str(BASE))), {"pooled_output": None}
    samples = [(torch.randn(4, 16, 16), torch.randn(1, 3 + i, 96), none) for i in range(4)]
    write_folder(tmp_path / "set", samples)
    dataset = built(family, path=str(tmp_path / "set"), caption_dropout=0.5)
    assert len(dataset.buckets) == 1
    assert dataset.samples["caption_dropout"].tolist() == [0.5] * 4
    crop = make_batch(dataset, [0], [0], range(1)).crop
    assert crop.tolist() == [[64, 64, 64, 64, 0, 0, 64, 64]], (
        "as large as the latents, and not cropped"
    )
    lengths = sorted(len(dataset.cond(row)["prompt_embeds"]) for row in range(4))
    assert lengths == [3, 4, 5, 6]
    family.comfy.max_tokens = 5
    with pytest.raises(DataError, match="sample 3: conditioning of 6 tokens; this model takes 5"):
        built(family, path=str(tmp_path / "set"))
