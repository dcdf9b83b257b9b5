"""Environments: an instance for each completion, reset with its row, whose methods are tools and which scores it."""

import asyncio
import inspect
import itertools
import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from test_tools import TEMPLATE, add, policy_that_calls, prompts_of, tokenizer_with
from tiny_models import DEMO_MODEL

from lowmem_grpo import GRPOConfig, Phase, cli
from lowmem_grpo.checkup.prompts import Look, one_prompt
from lowmem_grpo.data.prompts import Prompt, Scene, tokenize_prompts
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.identity import identity_of_tools, refuse_another_run
from lowmem_grpo.inputs.rewards import own_rewards, runner_of, try_out
from lowmem_grpo.inputs.tools import scenes_of, toolbox_of
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.output.folder import find_checkpoint, read_state
from lowmem_grpo.pipeline.phases import resolve
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.rollout.scoring import complete_and_score
from lowmem_grpo.tools.call_forms import Call
from lowmem_grpo.tools.conversation import ToolSampler, sampler_of
from lowmem_grpo.tools.environments import Environments
from lowmem_grpo.tools.form import Found, ToolForm

LENGTH = 40


class Game:
    """Guess the row's secret."""

    def __init__(self):
        self.guesses, self.resets = [], 0

    def reset(self, secret, **row):
        self.secret, self.guesses, self.resets = secret, [], self.resets + 1
        return f" 0 to {secret + 5}?"

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: the number
        """
        self.guesses.append(number)
        return "yes" if number == self.secret else "no"

    def get_reward(self):
        return float(sum(self.guesses))

    def _helper(self):
        raise AssertionError

    @property
    def computed(self):
        raise AssertionError


class Silent:
    """A game of another class, without a text and a reward of its own."""

    def reset(self, **row):
        assert "environment" not in row

    async def look(self, where: str) -> str:
        """Look somewhere.

        Args:
            where: the place
        """
        return where


def row_of(secret: int, **more) -> dict:
    return {"prompt": [{"role": "user", "content": "play"}], "secret": secret, **more}


def rows_of(count: int, **more) -> Dataset:
    return Dataset.from_list([row_of(secret, **more) for secret in range(count)])


def by_sevens(self, text: str) -> Found:
    """Calls in what a random model says: one for each 7."""
    calls = [Call("guess", {"number": place}) for place, one in enumerate(text) if one == "7"]
    return Found(calls, text[: text.index("7")] if calls else text)


CONFIG = GRPOConfig(use_cpu=True, bf16=False, max_completion_length=LENGTH, stop_strings=["7"], temperature=1.2)


@pytest.fixture
def playing(monkeypatch):
    """A policy whose completions end at a 3 or a 7, and guess where they have a 7."""
    return policy_that_calls(monkeypatch, by_sevens)


def sampler_with(policy, factory) -> ToolSampler:
    sampler = sampler_of(policy, CONFIG, toolbox_of(None, factory, CONFIG))
    assert isinstance(sampler, ToolSampler)
    sampler.engine_refusal = None
    return sampler


def scenes_in(policy, sampler, *secrets: int) -> list[Prompt]:
    """Prompts of as many games, with what the games say in them."""
    scenes = scenes_of(sampler.toolbox, Dataset.from_list([row_of(secret) for secret in secrets]), "rows")
    prompts = prompts_of(policy, *("1+1=", "what is 5*5?", "3")[: len(secrets)])
    return [
        replace(prompt, columns={"secret": scene.row["secret"]}, scene=scene)
        for prompt, scene in zip(prompts, scenes, strict=True)
    ]


# --- completions ---------------------------------------------------------------------------------------------------


def guesses_in(completion) -> list[int]:
    talk = completion.conversation
    calls = [call["function"] for message in talk.messages for call in message.get("tool_calls", [])]
    return [call["arguments"]["number"] for call in calls[: talk.num_calls]]


def test_each_completion_plays_with_an_instance_of_its_own(playing):
    sampler = sampler_with(playing, Game)
    prompts, seen = scenes_in(playing, sampler, 0, 7), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sampled = sampler.complete(prompts, 6)
        games = sampled.environments
        assert "guess" in sampler.form(prompts[0]).types
        assert len({*map(id, games)}) == 12 and [game.secret for game in games] == [0] * 6 + [7] * 6
        assert [game.guesses for game in games] == [*map(guesses_in, sampled.completions)]
        assert any(game.guesses for game in games) and sampled.metrics["time/tools_s"] > 0
        seen.append([(id(game), game.resets) for game in games])
    first, second = ([identity for identity, _ in each] for each in seen)
    assert first == second, "made once"
    assert all(then == before + 1 for (_, before), (_, then) in zip(*seen, strict=True)), "and reset each time"


def test_a_share_and_a_greedy_completion_have_instances_of_their_own(playing):
    sampler = sampler_with(playing, Game)
    prompts = scenes_in(playing, sampler, 1, 2, 3)
    sampled = sampler.complete(prompts, 2, range(2, 3))
    assert [game.secret for game in sampled.environments] == [3, 3]
    assert len(sampler.toolbox.environments.kinds[None].instances) == 2
    greedy = sampler.complete_greedily(prompts)
    assert [game.secret for game in greedy.environments] == [1, 2, 3]
    assert [game.guesses for game in greedy.environments] == [*map(guesses_in, greedy.completions)]


class Faulty(Game):
    """A game that cannot be reset, or says something else, as its class is told."""

    faults: ClassVar[dict[int, str]] = {}  # by the number of the reset
    num_resets = 0

    def reset(self, **row):
        said, fault = super().reset(**row), self.faults.get(Faulty.num_resets)
        Faulty.num_resets += 1
        if fault == "raises":
            raise SystemExit("gone")
        if fault == "hangs":
            time.sleep(9)
        return said + " or more" if fault == "differs" else said


@pytest.mark.parametrize("fault", ["raises", "hangs", "differs"])
def test_a_fault_costs_its_own_completion_alone(playing, monkeypatch, caplog, fault):
    """That is not scored and calls nothing, and the other ones are what they are without it."""
    scored: list[list] = []

    def count_reward(completions, environments, log_extra, **columns):
        scored.append([*environments])
        log_extra("guesses", [len(game.guesses) for game in environments])
        return [float(len(game.guesses)) for game in environments]

    sampler = sampler_with(playing, Faulty)
    sampler.toolbox.environments.kinds[None].timeout_s = 0.2
    prompts, judged = scenes_in(playing, sampler, 1, 2), []
    rewards = RewardRunner([count_reward, *own_rewards(sampler.toolbox, CONFIG)])
    lost_places: list[int] = []
    for _ in range(2):
        monkeypatch.setattr(Faulty, "num_resets", 0)
        monkeypatch.setattr(Faulty, "faults", dict.fromkeys(lost_places, fault))
        torch.manual_seed(6)
        judged.append(
            complete_and_score(playing, prompts, lambda share: sampler.complete(prompts, 4, share), rewards, 0)
        )
        lost_places = [at for at, one in enumerate(judged[0].completions) if one.conversation.num_calls][:2]
    whole, lost = judged
    left = [at for at in range(8) if at not in lost_places]
    assert lost.scores.rewards[lost_places].isnan().all() and len(lost_places) == 2 and len(scored[1]) == 6
    assert torch.equal(lost.scores.rewards[left], whole.scores.rewards[left])
    assert [lost.completions[at].ids for at in left] == [whole.completions[at].ids for at in left]
    assert not any(lost.completions[at].conversation.num_calls for at in lost_places)
    guesses = whole.scores.extra_columns["guesses"]
    assert lost.scores.extra_columns["guesses"] == [guesses[at] if at in left else None for at in range(8)]
    kept = sampler.toolbox.environments.kinds[None].instances
    assert fault == "differs" or [at for at, one in enumerate(kept) if one is None] == lost_places, "used no more"
    said = [record.message for record in caplog.records if "is not scored, and has no advantage" in record.message]
    assert len(said) == 2 and "(1 completion so far)" in said[0] and "Faulty" in said[0]
    if fault == "raises":
        monkeypatch.setattr(Faulty, "faults", dict.fromkeys(range(100), "raises"))
        lost = complete_and_score(playing, prompts, lambda share: sampler.complete(prompts, 4, share), rewards, 0)
        assert lost.scores.rewards.isnan().all() and len(scored) == 2, "no reward function is called for nothing"


# --- rewards -------------------------------------------------------------------------------------------------------


def scores_of(kind: type, count: int, timeout_s: float | None = None) -> tuple[list[float], list[str]]:
    """The rewards of instances, numbered by their secrets, and why others have none."""
    environments = Environments(kind, [], None)
    begun = environments.reset([row_of(number) for number in range(count)])
    runner = RewardRunner(environments.rewards(timeout_s), timeout_s)
    (call,) = runner._call_all(
        [""] * count, [""] * count, [[0]] * count, {}, 0, environments=[one.environment for one in begun]
    )
    assert runner.names == [kind.__name__]
    return call.rewards, [failure.message for failure in call.failures]


class Odd(Game):
    def get_reward(self):
        values = [0.5, None, math.nan, "x", ValueError, SystemExit]
        value = values[self.secret]
        if isinstance(value, type):
            raise value("no")
        return value


class Late(Game):
    def get_reward(self):
        time.sleep(9 if self.secret == 1 else 0.3)
        return self.secret


class LateAsync(Game):
    async def get_reward(self):
        await asyncio.sleep(9 if self.secret == 1 else 0.2)
        if self.secret == 2:
            raise ValueError("no")
        return self.secret


def test_a_reward_that_fails_costs_its_own_completion_alone():
    rewards, failures = scores_of(Odd, 6)
    assert rewards[0] == 0.5 and all(map(math.isnan, rewards[1:])) and len(failures) == 4  # None is none
    assert "ValueError: no" in failures[2] and "SystemExit: no" in failures[3]
    for kind, missing in ((Late, {1}), (LateAsync, {1, 2})):
        started = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:  # where a limit of all together would hold to the dot
            rewards, failures = pool.submit(scores_of, kind, 4, 0.5).result()
        assert time.perf_counter() - started < 3
        assert [number for number, reward in enumerate(rewards) if math.isnan(reward)] == sorted(missing)
        assert rewards[0] == 0 and rewards[3] == 3
        assert "get_reward took longer than reward_timeout=0.5 s" in failures[0]


def test_weights_are_for_reward_funcs_and_perhaps_for_environments():
    def one_reward(completions, **columns):
        return [1.0] * len(completions)

    own = own_rewards(toolbox_of(None, Game, CONFIG), CONFIG)
    for given, found in ((None, None), ([0.5], [0.5, 1.0]), ([0.5, 2.0], [0.5, 2.0])):
        runner, config = runner_of(one_reward, replace(CONFIG, reward_weights=given), own)
        assert runner.names == ["one_reward", "Game"] and config.reward_weights == found
    assert runner_of([], CONFIG, own)[0].names == ["Game"]
    with pytest.raises(InputError, match="^reward_weights has 3 numbers for 2 reward functions; give one for each"):
        runner_of(one_reward, replace(CONFIG, reward_weights=[1, 2, 3]), own)


# --- inputs --------------------------------------------------------------------------------------------------------


class NoMethod:
    def reset(self, **row):
        pass

    def get_reward(self):
        return 1.0


class NoReset:
    guess = Game.guess


class Unmade(Game):
    def __init__(self):
        raise SystemExit("no server")


class AsyncReset(Game):
    async def reset(self, **row):
        pass


class OtherEachTime(Game):
    count = 0

    def reset(self, **row):
        OtherEachTime.count += 1
        return str(OtherEachTime.count)


class Strict(Game):
    def reset(self, secret):
        pass


class Numbers(Game):
    def reset(self, **row):
        return 5


class Refuses(Game):
    def reset(self, secret, **row):
        if secret == 3:
            raise ValueError("three\nis none")


def made_in_turn(*kinds):
    kinds_in_turn = itertools.cycle(kinds)
    return lambda: next(kinds_in_turn)()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (NoMethod, "^the environment NoMethod has no public method that the policy could call; write one, or give tools$"),
        (NoReset, r"^the environment NoReset has no plain method reset\(self, \*\*row\), which begins"),
        (AsyncReset, r"^the environment AsyncReset has no plain method reset\(self, \*\*row\)"),
        (Unmade, "^environment_factory .*Unmade.* makes no environment: no server$"),
        (OtherEachTime, "^row 0 of rows: reset of the environment OtherEachTime returns something else each time, and a "
         "row's completions have one prompt; draw what is random from the row, as from a column seed$"),
        (Strict, r"^row 0 of rows: .* unexpected keyword argument 'prompt'; let it take \*\*row, since it is called"),
        (Numbers, "^row 0 of rows: .* reset returned 5, which is neither None nor a text; mend it, or leave the row out$"),
        (Refuses, "^row 3 of rows: the environment Refuses could not be reset: three; mend it, or leave the row out$"),
        ({"a": Game}, "^row 0 of rows: the environment None is none of a; name one in that column$"),
        ({1: Game, 2: Game}, "^row 0 of rows: the environment None is none of 1, 2; name one in that column$"),
        (made_in_turn(Game, Silent), "^row 0 of rows: .* its factory made a Silent; give a dict"),
        ({}, "^environment_factory is empty; name an environment for each kind of rows"),
        (5, "^environment_factory 5 cannot be called; give a class, or a function that makes an environment$"),
        ("Game", r"^no environment is named 'Game'; there are no built-in ones"),
        ("collections.Counter", "^collections.Counter is of Python's own and no environment; give module.function of"),
        ({"a": "numpy.ndarray"}, "^environment 'numpy.ndarray' is of an installed package; write a function"),
        ("nowhere.Game", "^environment 'nowhere.Game' cannot be imported"),
    ],
)  # fmt: skip
def test_what_is_no_environment_is_refused(factory, message):
    with pytest.raises(InputError, match=message):
        scenes_of(toolbox_of(None, factory, CONFIG), rows_of(5), "rows")


def test_what_does_not_go_with_environments_is_refused():
    def guess(number: int) -> int:
        """Guess.

        Args:
            number: the number
        """
        return number

    with pytest.raises(InputError, match="^two tools are named guess; rename one"):
        toolbox_of([guess], Game, CONFIG)
    with pytest.raises(InputError, match="^replay_buffer_size keeps what was sampled, but no conversation"):
        toolbox_of(None, Game, replace(CONFIG, replay_buffer_size=4))
    with pytest.raises(InputError, match="^rows has a column environments, by which reward functions get instances"):
        scenes_of(toolbox_of(None, Game, CONFIG), rows_of(2, environments=1), "rows")
    with pytest.raises(InputError, match="^train_dataset is missing; an environment that asks by itself is given rows"):
        train(str(DEMO_MODEL), environment_factory=Game)
    silent = {"train_dataset": [row_of(1)], "environment_factory": Silent, "config": CONFIG}
    with pytest.raises(InputError, match="^reward_funcs is missing"):
        train(str(DEMO_MODEL), **silent)


def test_a_reward_is_tried_with_environments_first():
    toolbox = toolbox_of(None, Odd, CONFIG)
    rewards = RewardRunner(own_rewards(toolbox, CONFIG))
    try_out(rewards, rows_of(2), "rows", CONFIG, toolbox)
    with pytest.raises(InputError, match="^reward function Odd returned 'x'; a reward is a finite number"):
        try_out(rewards, Dataset.from_list([row_of(3)]), "rows", CONFIG, toolbox)


def test_rows_choose_their_environment_and_see_its_tools_alone():
    rows = Dataset.from_list([row_of(n, environment=name) for n, name in enumerate(["game", "silent", "again"])])
    toolbox = toolbox_of([add], {"game": Game, "silent": Silent, "again": Game}, CONFIG)
    scenes = scenes_of(toolbox, rows, "rows")
    tokenizer = tokenizer_with(TEMPLATE)
    config = replace(CONFIG, max_prompt_length=None, system_prompt="Be brief.")
    prompts, _ = tokenize_prompts(rows, tokenizer, config, tools=toolbox.schemas, scenes=scenes)
    texts = [tokenizer.decode(prompt.ids) for prompt in prompts]
    for text, own, other in zip(texts, ("guess", "look", "guess"), ("look", "guess", "look"), strict=True):
        assert f'"name": "{own}"' in text and f'"name": "{other}"' not in text and '"name": "add"' in text
        assert "_helper" not in text and "computed" not in text and "get_reward" not in text
    assert [prompt.text[-1]["content"] for prompt in prompts] == ["play 0 to 5?", "play", "play 0 to 7?"]
    assert prompts[1].columns == {"secret": 1, "environment": "silent"}

    (reward,) = own_rewards(toolbox, CONFIG)
    begun = toolbox.environments.reset(list(rows))
    games = [one.environment for one in begun]
    assert [type(game) for game in games] == [Game, Silent, Game] and games[0] is not games[2]
    kinds = ["game", "silent", "again"]
    assert reward(["", "", ""], environments=games, environment=kinds) == [0.0, None, 0.0]
    talks = [Call("look", {"where": "up"}), Call("guess", {"number": 0}), Call("look", {"where": "up"})]
    results = toolbox(talks, [begun[place].methods for place in (1, 0, 0)])
    assert [result.content for result in results[:2]] == ["up", "yes"] and "not found" in results[2].content


def test_games_that_ask_alike_are_not_one_prompt():
    def look_at(*scenes: Scene | None) -> Look:
        prompts = [Prompt([{"role": "user", "content": "play"}], [5], {}, scene=scene) for scene in scenes]
        return Look(SimpleNamespace(prompts=prompts, config=CONFIG, tokenizer=None))

    assert one_prompt(look_at(*(Scene(row_of(secret), None, []) for secret in range(3)))) is None
    assert "there is only one prompt" in one_prompt(look_at(None, None))


# --- runs ----------------------------------------------------------------------------------------------------------


def run(folder, factory=Game, eval_rows=None, **changes):
    settings = {
        "max_steps": 2, "prompts_per_step": 1, "num_generations": 4, "max_completion_length": LENGTH,
        "max_prompt_length": None, "learning_rate": 1e-3, "gradient_checkpointing": False, "temperature": 1.5,
        "stop_strings": ["7"], "use_cpu": True, "bf16": False, "output_dir": str(folder), **changes,
    }  # fmt: skip
    return train(
        str(DEMO_MODEL), None, rows_of(8), eval_rows, GRPOConfig(**settings), tokenizer=tokenizer_with(TEMPLATE),
        environment_factory=factory,
    )  # fmt: skip


@pytest.mark.usefixtures("known_trials")
def test_a_run_with_environments_learns_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(ToolForm, "calls", by_sevens)
    whole = run(tmp_path / "whole", eval_rows=[row_of(9)])
    assert all(line["rewards/Game/mean"] > 0 and line["rewards/Game/failures"] == 0 for line in whole.history)
    assert all(line["eval_rewards/Game/mean"] >= 0 for line in whole.eval_history)
    assert "play 0 to " in (tmp_path / "whole/data_preview.txt").read_text(encoding="utf-8")
    run(tmp_path / "part", max_steps=1)
    again = run(tmp_path / "part", resume_from_checkpoint=True)
    assert again.history[-1]["loss"] == whole.history[-1]["loss"] != 0

    class Changed(Game):
        def get_reward(self):
            return 2 * super().get_reward()

    class Other(Game):
        def more(self) -> None:
            """Do more."""

    Changed.__name__ = Other.__name__ = "Game"
    checkpoint = find_checkpoint(tmp_path / "part", True)
    saved = read_state(checkpoint)["identity"]
    refuse_another_run(checkpoint, {**saved, **identity_of_tools(toolbox_of(None, Game, CONFIG))})
    with pytest.raises(InputError, match="other tools: Game, an environment, is not in both, or is described"):
        refuse_another_run(checkpoint, {**saved, **identity_of_tools(toolbox_of(None, Other, CONFIG))})
    with pytest.warns(UserWarning, match="the environment Game has other source code than in"):
        refuse_another_run(checkpoint, {**saved, **identity_of_tools(toolbox_of(None, Changed, CONFIG))})


def test_commands_and_pipelines_name_environments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO_MODEL, "model")
    Path("model/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    Path("my_game_of_a_test.py").write_text(inspect.getsource(Game), encoding="utf-8")
    Path("rows.jsonl").write_text(json.dumps(row_of(4, environment="game")), encoding="utf-8")
    Path("game.yaml").write_text("environment_factory: {game: my_game_of_a_test.Game}\n", encoding="utf-8")
    given = ["--model", "model", "--dataset", "rows.jsonl"]
    asked = [*given, "--use_cpu", "true", "--max_prompt_length", "none"]
    for named in (["--environment_factory", "my_game_of_a_test.Game"], ["--config", "game.yaml"]):
        assert cli.main(["data", *asked, *named]) == 0
        shown = capsys.readouterr().out
        assert '"name": "guess"' in shown and "play 0 to 9?" in shown and "Game: not called for this" in shown
    for command in ("sft", "sample"):
        assert cli.main([command, *given, "--config", "game.yaml", *(["--output", "x"] * (command == "sample"))]) == 2
        assert "environment_factory is for `lowmem-grpo train`" in capsys.readouterr().err
    assert cli.main(["eval", *asked, "--environment_factory", "my_game_of_a_test.Gam"]) == 2
    assert "environment 'my_game_of_a_test.Gam' cannot be imported" in capsys.readouterr().err

    evaluation = {"dataset": "rows.jsonl", "environment_factory": "my_game_of_a_test.Game"}
    phase = Phase("rl", "grpo", dataset="rows.jsonl", environment_factory={"game": "my_game_of_a_test.Game"})
    found = resolve("model", [phase], "out", evaluation=evaluation)
    assert found.evaluation.called == {"environment_factory": "my_game_of_a_test.Game"}
    assert found.runs[0].inputs["environment_factory"] == {"game": "my_game_of_a_test.Game"}
    with pytest.raises(InputError, match="environment_factory is the phase rl, which makes a policy; name one that"):
        resolve("model", [phase, Phase("more", "grpo", dataset="rows.jsonl", environment_factory="rl")], "out")
