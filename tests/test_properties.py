"""What must hold for any input: masking, tokens, metrics, annotations and recipes under hypothesis."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_annotations import draw

import irra_core as irra
from irra_core.annotations import load_annotations
from irra_core.metrics import query_metrics
from irra_core.recipes import LOSS_NAMES, Recipe, read_recipe
from irra_core.text import END_ID, MASK_ID, START_ID, detokenize_words, mask_tokens

WORDS = st.lists(st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=9), min_size=0, max_size=30)
SEEDS = st.integers(0, 2**31 - 1)
some = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@some
@given(st.lists(WORDS.map(" ".join), min_size=1, max_size=5), SEEDS, st.floats(0, 1))
def test_masking_keeps_what_it_does_not_ask_for_and_asks_for_what_was_there(captions, seed, probability):
    tokens = irra.tokenize(captions)
    masked, labels = mask_tokens(tokens, torch.Generator().manual_seed(seed), probability)
    asked = labels != 0
    assert torch.equal(masked[~asked], tokens[~asked])
    assert torch.equal(labels[asked], tokens[asked])
    assert not (asked & ((tokens == START_ID) | (tokens == END_ID) | (tokens == 0))).any()
    words = (tokens > 0) & (tokens < MASK_ID)
    assert torch.equal(asked.any(1), words.any(1))  # at least one word, where there is one
    if probability == 1:
        assert torch.equal(asked, words)


@some
@given(WORDS)
def test_words_come_back_from_their_tokens_as_far_as_they_fit(words):
    (tokens,) = irra.tokenize([" ".join(words)])
    found = [word for word, _ in detokenize_words(tokens)]
    if tokens[-1] == 0:  # nothing was cut
        assert found == words
    assert found[:-1] == words[: max(0, len(found) - 1)]


@some
@given(st.lists(WORDS.map(" ".join), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_a_captions_tokens_do_not_depend_on_the_others(captions, random):
    order = list(range(len(captions)))
    random.shuffle(order)
    assert torch.equal(irra.tokenize([captions[i] for i in order]), irra.tokenize(captions)[order])


@st.composite
def rankings(draw_one):
    """Similarities with ties, and identities of which every query's is in the gallery."""
    queries, gallery = draw_one(st.integers(1, 6)), draw_one(st.integers(1, 12))
    whole = st.integers(-5, 5)
    similarity = draw_one(st.lists(whole, min_size=queries * gallery, max_size=queries * gallery))
    there = draw_one(st.lists(st.integers(0, 3), min_size=gallery, max_size=gallery))
    asked = draw_one(st.lists(st.sampled_from(there), min_size=queries, max_size=queries))
    return torch.tensor(similarity).double().view(queries, gallery), torch.tensor(asked), torch.tensor(there)


def equal(ours, theirs) -> None:
    """Fail unless two results of query_metrics are the same, bit for bit."""
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@some
@given(rankings(), SEEDS)
def test_metrics_do_not_depend_on_the_order_of_queries_or_gallery(ranking, seed):
    similarity, asked, there = ranking
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(len(x), generator=generator) for x in (asked, there))
    shuffled = query_metrics(similarity[rows][:, columns], asked[rows], there[columns])
    equal(shuffled, {name: values[rows] for name, values in query_metrics(similarity, asked, there).items()})


@some
@given(rankings(), st.floats(1e-3, 1e3), st.floats(-100, 100), st.permutations(range(4)))
def test_metrics_do_not_depend_on_scale_shift_or_the_names_of_people(ranking, scale, shift, names):
    similarity, asked, there = ranking
    names = torch.tensor(names)
    equal(query_metrics(similarity * scale + shift, names[asked], names[there]), query_metrics(*ranking))


@some
@given(rankings())
def test_asking_twice_changes_no_average_and_every_photo_twice_no_inp(ranking):
    similarity, asked, there = ranking
    found = query_metrics(similarity, asked, there)
    twice = query_metrics(similarity.repeat(2, 1), asked.repeat(2), there)
    equal(twice, {name: values.repeat(2) for name, values in found.items()})
    doubled = query_metrics(similarity.repeat(1, 2), asked, there.repeat(2))
    assert doubled["INP"].tolist() == pytest.approx(found["INP"].tolist())
    wrong = found["rank"] - 1  # of the photos before the first right one, each stands there twice
    assert torch.equal(doubled["rank"], 2 * wrong + 1)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)


@some
@given(
    st.lists(st.tuples(st.integers(-(10**17), 10**17), TEXTS, st.sampled_from(["train", "val", "test"])), min_size=1)
)
def test_any_records_come_back_from_json_as_they_are(tmp_path, records):
    draw(tmp_path / "a.png")
    content = [{"id": i, "captions": [text, text], "split": s, "file_path": "a.png"} for i, text, s in records]
    (tmp_path / "own.json").write_text(json.dumps(content))
    table = load_annotations(tmp_path / "own.json")
    rows = [record for record in records for _ in range(2)]
    assert list(zip(table.pid, table.caption, table.split, strict=True)) == rows
    assert (table.image_id == 0).all()


LOSSES = st.lists(st.sampled_from(LOSS_NAMES), min_size=1, max_size=4, unique=True).map("+".join)


@some
@given(
    LOSSES,
    st.integers(2, 4096),
    st.floats(0, 1e3, exclude_min=True),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["val", "last", "test"]),
)
def test_a_recipe_comes_back_from_json_or_was_refused(losses, batch_size, lr, probability, masked, select_on):
    chosen = {"losses": losses, "batch_size": batch_size, "lr": lr, "mask_captions": masked, "select_on": select_on}
    if not set(losses.split("+")) & {"sdm", "itc", "cmpm", "tal", "ibm", "nitc", "ritc"}:
        with pytest.raises(ValueError, match="align nothing"):
            irra.recipe(**chosen)
        return
    made = irra.recipe(**chosen, erase_probability=probability)
    assert read_recipe(json.loads(made.to_json())) == made
    changed = {name for name in made.differences() if name not in chosen}
    assert changed <= {"erase_probability"}
    assert dataclasses.asdict(made) | made.differences() == dataclasses.asdict(made)


@some
@given(st.sampled_from([field.name for field in dataclasses.fields(Recipe)]), st.integers(0, 40), st.characters())
def test_a_misspelt_field_is_never_taken_for_another(name, place, letter):
    misspelt = name[:place] + letter + name[place:]
    with pytest.raises(ValueError, match="is unknown"):
        irra.recipe(**{misspelt: None})


@some
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.floats(-50, 50), SEEDS)
def test_an_interval_moves_and_grows_with_its_values(pids, shift, seed):
    from irra_core.metrics import bootstrap_interval

    values = np.random.default_rng(seed).normal(size=len(pids))
    low, high = bootstrap_interval(values, np.array(pids), draws=50)
    assert low <= high
    moved = bootstrap_interval(values * 3 + shift, np.array(pids), draws=50)
    assert moved == pytest.approx((low * 3 + shift, high * 3 + shift), abs=1e-9)
