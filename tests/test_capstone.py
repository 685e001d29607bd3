"""The capstone: what methods cost, how one is chosen, and the leaderboard."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.compare.capstone import budget, choosing, hidden, leaderboard
from lora_from_scratch.compare.capstone.leaderboard import Entry
from lora_from_scratch.compare.shootout import contestants
from lora_from_scratch.finetune.data import references_by_mr
from lora_from_scratch.finetune.story_cards import references, story_cards
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods import registry
from lora_from_scratch.methods.adapters import Adapter
from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.qlora import QLoRA
from tests.cli_calls import call

CONFIG = GPT2Config.from_json(checkpoint_directory("bundled") / "config.json")
COST = dict.fromkeys(budget.COSTS, 1.0)


@pytest.fixture(autouse=True)
def _a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FROM_SCRATCH_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """A reference for each card: nobody can be much better."""
    return {mr: references(mr, seed=hidden.HOME_SEED)[0] for mr in hidden.hidden_cards()}


def entry(texts: dict[str, str], **changed: object) -> Entry:
    return replace(Entry("mine", "tenants", dict(COST), texts), **changed)  # type: ignore[arg-type]


# --- Costs ---------------------------------------------------------------------------------------------


def test_the_work_of_the_base_is_that_of_its_matrices_and_its_attention() -> None:
    d, tokens = CONFIG.n_embd, 64
    by_hand = CONFIG.n_layer * (12 * d * d + 2 * tokens * d) + CONFIG.vocab_size * d
    assert budget.base_work(CONFIG) == by_hand


@pytest.mark.parametrize("method", [LoRA(), QLoRA(keep_base=False)], ids=["lora", "qlora"])
def test_a_lora_adds_the_work_of_its_two_thin_matrices_and_none_when_it_is_merged(method: LoRA) -> None:
    d = CONFIG.n_embd
    thin = CONFIG.n_layer * 8 * ((d + 3 * d) + (d + d) + 2 * (d + 4 * d))  # rank 8 on the four matrices of a block
    cost = budget.cost_of(CONFIG, method)
    assert (cost["added_work"], cost["trained_parameters"], cost["saved_bytes"]) == (thin, thin, 4 * thin)
    assert budget.cost_of(CONFIG, method, merged=True)["added_work"] == 0


def test_full_fine_tuning_saves_a_checkpoint_and_adds_no_work() -> None:
    cost = budget.cost_of(CONFIG, FullFineTuning(keep_base=False))
    assert cost["saved_bytes"] == 4 * cost["trained_parameters"] == 4 * 5_853_184
    assert cost["added_work"] == 0


def test_an_adapter_cannot_be_merged_and_says_so() -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        budget.cost_of(CONFIG, Adapter(), merged=True)


@pytest.fixture(scope="module")
def costs() -> list[dict[str, int]]:
    """Of every method, and of those that can be merged once more: merged."""
    found = []
    for method in contestants().values():
        cost = budget.cost_of(CONFIG, method)
        found += [cost, cost | {"added_work": 0}] if method.can_merge else [cost]
    return found


def test_merging_costs_nothing_but_the_added_work() -> None:
    method = contestants()["lora"]
    alone, merged = budget.cost_of(CONFIG, method), budget.cost_of(CONFIG, method, merged=True)
    assert alone["added_work"] > 0
    assert merged == alone | {"added_work": 0}


@pytest.mark.parametrize("brief", budget.BRIEFS)
def test_a_brief_leaves_a_choice_and_rules_something_out(brief: str, costs: list[dict[str, int]]) -> None:
    limits = budget.budget_of(brief, CONFIG)
    fitting = [cost for cost in costs if not budget.over_budget(cost, limits)]
    assert 2 <= len(fitting) <= len(costs) - 2


def test_an_unknown_brief_is_refused() -> None:
    with pytest.raises(ValueError, match="there are tenants, latency, laptop"):
        budget.budget_of("phone", CONFIG)


# --- Choosing ------------------------------------------------------------------------------------------

numbers = st.integers(0, 3)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_candidate_is_off_the_front_exactly_if_one_on_it_beats_it(rows: list[tuple[int, int, int]]) -> None:
    values = torch.tensor(rows).double()
    front = choosing.pareto_front(values[:, :2], values[:, 2])

    def beats(i: int, j: int) -> bool:
        one, other = rows[i], rows[j]
        return one != other and one[0] <= other[0] and one[1] <= other[1] and one[2] >= other[2]

    assert front
    for j in range(len(rows)):
        assert (j not in front) == any(beats(i, j) for i in front)


def test_the_chosen_one_is_on_the_front() -> None:
    candidates = {
        name: {**budget.cost_of(CONFIG, method), "quality": float(place % 3)}
        for place, (name, method) in enumerate({"a": LoRA(), "b": BitFit(), "c": Adapter()}.items())
    }
    chosen = choosing.choose_method(candidates, {"trained_parameters": 100_000})
    assert chosen == "b"


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_the_shares_of_draws_that_either_system_wins_are_one_together(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randint(0, 3, (2, 7), generator=generator)
    places = torch.randint(0, 7, (20, 7), generator=generator)
    both = choosing.paired_bootstrap(one, other, places) + choosing.paired_bootstrap(other, one, places)
    assert both == pytest.approx(1)


def test_the_bootstrap_agrees_with_the_normal_distribution_on_many_cards() -> None:
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(400, generator=generator, dtype=torch.float64)
    difference += 0.05 - difference.mean()  # a mean of one standard error exactly, when divided by the deviation
    difference = difference / difference.std()
    places = torch.randint(0, 400, (4000, 400), generator=generator)
    expected = torch.special.ndtr(difference.mean() * 20)  # 20 = sqrt(400)
    assert choosing.paired_bootstrap(difference, torch.zeros(400), places) == pytest.approx(float(expected), abs=0.02)


# --- Hidden cards --------------------------------------------------------------------------------------


def test_hidden_cards_are_none_that_anybody_trains_or_tunes_on() -> None:
    data = story_cards()
    known = set(references_by_mr([*data.train, *data.validation, *data.test]))
    cards = hidden.hidden_cards()
    assert len(set(cards)) == hidden.CARDS
    assert not set(cards) & set(hidden.hidden_cards(seed=1))
    many = hidden.hidden_cards(count=3000)  # among so many some would be known if they were not left out
    assert many[: hidden.CARDS] == cards
    assert not known & set(many)


def test_references_score_high_and_the_texts_of_other_cards_low(texts: dict[str, str]) -> None:
    cards = list(texts)
    bleu, errors = hidden.score(texts, cards)
    assert bleu > 99
    assert errors == 0
    turned = dict(zip(cards, [*texts.values()][1:] + [*texts.values()][:1], strict=True))
    assert hidden.score(turned, cards)[1] > 0.5


# --- The board -----------------------------------------------------------------------------------------


def test_an_entry_comes_back_from_its_file(tmp_path: Path, texts: dict[str, str]) -> None:
    leaderboard.write_entry(tmp_path / "entry.json", entry(texts))
    assert leaderboard.read_entry(tmp_path / "entry.json") == entry(texts)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": " "}, "1 to 60 characters"),
        ({"brief": "phone"}, "there is no brief"),
        ({"cost": {"saved_bytes": 1}}, "must give a number"),
        ({"cost": COST | {"saved_bytes": -1}}, "must give a number"),
        ({"cost": COST | {"saved_bytes": True}}, "must give a number"),
        ({"texts": {"a": 3}}, "a text for each card"),
        ({"texts": {}}, "have no text"),
        ({"extra": 1}, "needs name, brief, cost and texts"),
    ],
)
def test_an_entry_that_is_not_whole_is_left_out_with_the_reason(
    tmp_path: Path, texts: dict[str, str], changed: dict[str, object], said: str
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(asdict(entry(texts)) | changed), encoding="utf-8")
    code, out, err = call("leaderboard", tmp_path / "bad.json")
    assert code == 1
    assert said in err
    assert "mine" not in out


def test_a_file_that_is_no_entry_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "short.json").write_text("{}", encoding="utf-8")
    code, _, err = call("leaderboard", tmp_path / "bad.json", tmp_path / "short.json")
    assert code == 1
    assert err.count("left out") == 2


def test_a_file_that_is_not_there_ends_before_any_board(tmp_path: Path) -> None:
    code, out, err = call("leaderboard", tmp_path / "none.json")
    assert (code, out, err) == (2, "", f"error: there is no entry {tmp_path / 'none.json'}\n")


def test_the_boards_end_with_what_their_columns_mean(tmp_path: Path) -> None:
    _, out, _ = call("leaderboard", "--brief", "tenants")
    for column in ("BLEU", "slot errors", "trained", "memory", "added work", "saved", "(!)"):
        assert f"{column}: " in out


def test_the_best_within_the_budget_is_first_and_who_exceeds_it_has_no_place(texts: dict[str, str]) -> None:
    limits = {"saved_bytes": 10.0}
    good = leaderboard.judge_entry(entry(texts, name="good"), limits)
    dear = leaderboard.judge_entry(entry(texts, name="dear", cost=COST | {"saved_bytes": 11.0}), limits)
    same = leaderboard.judge_entry(entry(texts, name="same"), limits)
    poor = leaderboard.judge_entry(entry(dict.fromkeys(texts, "A tale."), name="poor"), limits)
    board = leaderboard.placed([poor, dear, same, good])
    assert [(line.name, line.place) for line in board] == [("good", 1), ("same", 1), ("poor", 3), ("dear", None)]
    assert "11" not in leaderboard.board(board[:3])
    assert "(!)" in leaderboard.board(board)


def test_what_was_submitted_is_on_the_board_once(tmp_path: Path, texts: dict[str, str]) -> None:
    worse = entry(dict.fromkeys(texts, "A tale."))
    leaderboard.submit(worse, CONFIG, tmp_path / "capstone.json")
    lines = leaderboard.submit(entry(texts), CONFIG, tmp_path / "capstone.json")
    assert [line.place for line in lines if line.name == "mine"] == [1]
    code, out, _ = call("leaderboard", "--brief", "tenants")
    assert (code, out.count("| mine")) == (0, 1)
    assert leaderboard.read_entry(tmp_path / "capstone.json") == entry(texts)


def test_a_name_on_the_board_is_only_text_in_its_cell(tmp_path: Path, texts: dict[str, str]) -> None:
    file = tmp_path / "entry.json"
    leaderboard.write_entry(file, entry(texts, name="a\x1b[2J|b\nc\u202e"))
    _, out, _ = call("leaderboard", "--brief", "tenants", file)
    assert not [c for c in out if c != "\n" and not c.isprintable()]
    assert "| a\N{REPLACEMENT CHARACTER}[2J\\|b c" in out


def test_a_class_has_cards_of_its_own_from_a_seed(tmp_path: Path) -> None:
    code, _, _ = call("leaderboard", "--cards-seed", "5", "--write-cards", tmp_path / "cards.txt")
    assert code == 0
    assert (tmp_path / "cards.txt").read_text(encoding="utf-8").splitlines() == hidden.hidden_cards(5)


def test_the_courses_own_entries_are_of_the_bundled_model_and_cost_what_is_computed() -> None:
    methods = contestants()
    lines = {line.name: line for line in leaderboard.house_entries("tenants", {})}
    assert len(lines) >= 10
    for name, line in lines.items():
        method, _, merged = name.partition(", ")
        assert line.cost == budget.cost_of(CONFIG, methods[method], merged=bool(merged))


def test_the_decision_guide_names_every_method_of_the_library() -> None:
    text = (Path(__file__).parent.parent / "course" / "units" / "unit_14.py").read_text(encoding="utf-8")
    guide = text.split("# ## Which method to use when")[1].split("# ## What goes wrong in practice")[0].lower()
    said = {word.replace("-", "") for word in re.findall(r"[a-z0-9-]+", guide.replace("+", "-plus"))}
    missing = [name for name in registry.method_classes() if not {name.replace("-", ""), f"{name}s"} & said]
    assert missing == []
