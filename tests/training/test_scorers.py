"""Rewards and preferences from functions and models, and what becomes of whatever goes wrong there."""

from __future__ import annotations

import asyncio
import math
import time

import pytest
import torch

from fastpo.training import task
from fastpo.training.errors import UserError
from fastpo.training.scorers import (
    BradleyTerryJudge,
    Combined,
    FunctionJudge,
    FunctionScorer,
    LikelihoodScorer,
    ModelScorer,
    Part,
    Sample,
    load_judge,
    load_scorer,
)

from .conftest import CHARACTERS, TEMPLATE, character_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("threads")
EOS = len(CHARACTERS)


def sample(prompt: str = "ab ", completion: str = "cd", /, *, ended: bool = True, **row: object) -> Sample:
    ids = [CHARACTERS.index(c) for c in completion]
    return Sample(prompt, completion, [CHARACTERS.index(c) for c in prompt], [*ids, EOS] if ended else ids, ended, row)


SAMPLES = [sample("ab ", "cd"), sample("e", "fgh", ended=False), sample("abc", ""), sample("x y", "zzzzzz")]


@pytest.fixture
def tokenizer():
    return character_tokenizer(eos_token="[E]", bos_token="[B]", pad_token="[E]")


def file(tmp_path, text: str) -> str:
    path = tmp_path / "rewards.py"
    path.write_text(text)
    return str(path)


class TestFunctions:
    def test_it_is_called_as_trl_calls_it(self):
        seen = {}

        def reward(prompts, completions, completion_ids, solution, **rest):
            seen.update(locals())
            return [float(len(c) == n) for c, n in zip(completions, solution, strict=True)]

        given = [sample("a", "bc", solution=2, level="x"), sample("d", "e", solution=3)]
        assert FunctionScorer(reward, "reward")(given) == [1.0, 0.0]
        assert seen["prompts"] == ["a", "d"] and seen["completions"] == ["bc", "e"]
        assert seen["completion_ids"] == [[1, 2, EOS], [4, EOS]]
        assert seen["rest"] == {"level": ["x", None]}

    def test_conversations_stay_such(self):
        turns = [{"role": "user", "content": "hi"}]

        def reward(prompts, completions):
            assert prompts == [turns]
            return [len(c[0]["content"]) for c in completions if c[0]["role"] == "assistant"]

        assert FunctionScorer(reward, "reward")([sample("<user>hi", "four", prompt=turns)]) == [4.0]

    def test_numbers_of_any_kind(self):
        import numpy

        for returned in (
            [True, 2],
            [1.0, numpy.float32(2)],
            torch.tensor([1.0, 2.0]),
            numpy.array([1, 2]),
            (torch.tensor(1), numpy.int64(2)),
            [numpy.bool_(True), torch.tensor([2.0])],
        ):
            assert FunctionScorer(lambda completions, returned=returned: returned, "f")(SAMPLES[:2]) == [1.0, 2.0]

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("1 / (len(completions[0]) - 2) and [0]", "raised ZeroDivisionError: division by zero (line 2 of "),
            ("None", "it must return a list of numbers, got NoneType"),
            ("'ab'", "it must return a list of numbers, got str"),
            ("(1 for _ in completions)", "it must return a list of numbers, got generator"),
            ("[1, 2]", "it returned 2 numbers for 1 samples"),
            ("['x']", "'x' is no finite number, for the completion 'cd' of the prompt 'ab '"),
            ("[1j]", "1j is no finite number"),
            ("[[1]]", "[1] is no finite number"),
            ("[float('inf')]", "inf is no finite number"),
            ("[None]", "there is no reward (None or NaN) for the completion 'cd' of the prompt 'ab '"),
            ("[float('nan')]", "there is no reward (None or NaN) for"),
        ],
    )
    @pytest.mark.parametrize("prefix", ["", "async "])
    def test_whatever_goes_wrong_names_function_and_sample(self, prefix, body, message, tmp_path, tokenizer):
        spec = file(tmp_path, f"{prefix}def good(completions, **_):\n    return {body}\n") + ":good"
        with pytest.raises(UserError) as caught:
            load_scorer([spec], tokenizer)([sample()])
        assert str(caught.value).startswith(f"{spec}: ") and message in str(caught.value)

    def test_the_sample_that_raises_is_found(self):
        def reward(completions):
            return [1 / len(c) for c in completions]

        with pytest.raises(UserError, match=r"ZeroDivisionError.*the completion '' of the prompt 'abc'") as caught:
            FunctionScorer(reward, "reward")(SAMPLES)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

        def together(completions):
            raise OSError("no network") if len(completions) > 1 else ValueError
            return [0.0]

        def never_alone(completions):
            if len(completions) > 1:
                raise OSError("no network")
            return [0.0]

        with pytest.raises(UserError, match=r"raised ValueError \(line .* the completion 'cd' of the prompt 'ab '"):
            FunctionScorer(together, "f")(SAMPLES)
        with pytest.raises(UserError, match=r"raised OSError: no network .* for a batch of 4 samples"):
            FunctionScorer(never_alone, "f")(SAMPLES)

    def test_the_sample_that_an_asynchronous_function_raises_for_is_found(self):
        async def reward(completions):
            await asyncio.sleep(0)
            return [1 / len(c) for c in completions]

        with pytest.raises(UserError, match=r"ZeroDivisionError.* of .*test_scorers.py\), for .* '' of") as caught:
            FunctionScorer(reward, "reward")(SAMPLES)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_a_function_that_hides_its_parameters(self):
        with pytest.raises(UserError, match="f: what it takes cannot be told: no signature found for builtin type"):
            FunctionScorer(dict, "f")

    def test_a_missing_column(self):
        with pytest.raises(UserError, match="f: it takes solution, but the data have only: level, prompts, compl"):
            FunctionScorer(lambda completions, solution: [], "f")([sample(level=1)])

    def test_unscored_samples_may_be_skipped(self):
        scorer = FunctionScorer(lambda completions: [None, float("nan"), 1, 0], "f", unscored="skip")
        assert [math.isnan(r) for r in scorer(SAMPLES)] == [True, True, False, False]


def until(condition) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class TestAsynchronous:
    def test_rewards_wait_together(self):
        """Each answers only when all have begun, also one that is not asynchronous."""
        begun: set[str] = set()

        def waiting(name):
            async def reward(completions):
                begun.add(name)
                while len(begun) < 3:
                    await asyncio.sleep(0.001)
                return [len(c) for c in completions]

            return FunctionScorer(reward, name)

        def plain(completions):
            until(lambda: len(begun) == 2)
            begun.add("plain")
            return [1.0] * len(completions)

        parts = [Part("a", waiting("a")), Part("plain", FunctionScorer(plain, "plain"), 10.0), Part("b", waiting("b"))]
        both = Combined(parts)
        assert both(SAMPLES) == [14.0, 16.0, 10.0, 22.0]
        assert list(both.means) == ["a", "plain", "b"] and both.means["b"] == 2.75

    def test_they_keep_their_loop(self):
        """Sessions belong to one; and the caller may have another."""
        loops = []

        class Reward:
            async def __call__(self, completions):
                loops.append(asyncio.get_running_loop())
                return [0.0] * len(completions)

        scorer = FunctionScorer(Reward(), "reward")

        async def notebook():
            return scorer(SAMPLES)

        assert scorer(SAMPLES) == asyncio.run(notebook()) == [0.0] * 4
        assert loops[0] is loops[1] and loops[0].is_running()

    def test_what_has_begun_is_cancelled_by_an_error(self):
        seen = []

        async def endless(completions):
            seen.append("begun")
            try:
                await asyncio.sleep(3600)
            finally:
                seen.append("cancelled")

        def plain(completions):
            until(lambda: seen)
            raise OSError("no network")

        parts = [Part("plain", FunctionScorer(plain, "plain")), Part("endless", FunctionScorer(endless, "endless"))]
        with pytest.raises(UserError, match="plain: raised OSError"):
            Combined(parts)(SAMPLES[:1])
        until(lambda: seen == ["begun", "cancelled"])

    def test_a_judge(self):
        async def longer(first, second):
            return [len(a) > len(b) for a, b in zip(first, second, strict=True)]

        assert FunctionJudge(longer, "longer")([sample("a", "bc")], [sample("a", "b")]) == [1.0]


class TestModels:
    @pytest.fixture
    def folder(self, tmp_path, tokenizer):
        """A reward model, as transformers saves it."""
        return self.save(tmp_path / "rm", tokenizer)

    @staticmethod
    def save(folder, tokenizer, **config):
        from transformers import LlamaForSequenceClassification

        base = tiny_model(len(tokenizer)).config
        base.update({"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, **config})
        torch.manual_seed(3)
        LlamaForSequenceClassification(base).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    @staticmethod
    def alone(folder, ids):
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            return [float(model(input_ids=torch.tensor([row])).logits) for row in ids]

    @pytest.mark.parametrize("tokens", [4096, 9, 1])
    def test_the_policys_tokens(self, folder, tokenizer, tokens):
        expected = self.alone(folder, [s.prompt_ids + s.ids for s in SAMPLES])
        found = ModelScorer(folder, tokenizer, tokens=tokens)(SAMPLES)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5) and len({*found}) == 4

    def test_a_classifier_gives_the_probability(self, tmp_path, folder, tokenizer):
        classifier = self.save(tmp_path / "classifier", tokenizer, problem_type="multi_label_classification")
        logits = torch.tensor(ModelScorer(folder, tokenizer)(SAMPLES))
        assert ModelScorer(classifier, tokenizer)(SAMPLES) == pytest.approx(logits.sigmoid().tolist(), rel=1e-6)

    def test_another_vocabulary_reads_the_text(self, tmp_path, tokenizer):
        other = character_tokenizer(CHARACTERS[::-1], eos_token="[E]", pad_token="[B]")
        folder = self.save(tmp_path / "rm", other)
        texts = ["ab cd[E]", "efgh", "abc[E]", "x yzzzzzz[E]"]
        expected = self.alone(folder, [other(text)["input_ids"] for text in texts])
        assert ModelScorer(folder, tokenizer)(SAMPLES) == pytest.approx(expected, rel=1e-4, abs=1e-5)

    def test_another_chat_template(self, tmp_path, tokenizer):
        other = character_tokenizer(eos_token="[E]", bos_token="[B]", pad_token="[B]")
        other.chat_template = TEMPLATE
        tokenizer.chat_template = TEMPLATE.replace("assistant", "bot")
        folder = self.save(tmp_path / "rm", other)
        turns = [{"role": "user", "content": "hi"}]
        given = [
            sample("<user>hi", "ok", prompt=turns),
            sample("hi", "ok", prompt=[*turns, {"role": "assistant", "content": "not "}]),
        ]
        texts = ["<user>hi[E]\n<assistant>ok[E]\n", "<user>hi[E]\n<assistant>not ok[E]\n"]
        expected = self.alone(folder, [other(text)["input_ids"] for text in texts])
        assert ModelScorer(folder, tokenizer)(given) == pytest.approx(expected, rel=1e-4, abs=1e-5)

    def test_an_autoregressive_model(self, model_folder, tokenizer):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
        scorer = load_scorer([str(model_folder)], tokenizer, tokens=9).parts[0].scorer
        assert isinstance(scorer, LikelihoodScorer)
        for one, rewards, total in zip(SAMPLES, scorer.tokens(SAMPLES), scorer(SAMPLES), strict=True):
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([one.prompt_ids + one.ids])).logits[0].log_softmax(-1)
            first = len(one.prompt_ids) - 1
            expected = [float(logprobs[first + i, token]) for i, token in enumerate(one.ids)]
            assert rewards == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert total == pytest.approx(sum(expected), rel=1e-4, abs=1e-5)

    def test_what_is_no_reward_model(self, tmp_path, model_folder, tokenizer):
        from transformers import AutoModel

        with pytest.raises(UserError, match=r"nowhere: is no function .* and no model can be loaded: "):
            load_scorer([str(tmp_path / "nowhere")], tokenizer)
        with pytest.raises(UserError, match=r"no trained reward model: there are no weights for score\.weight"):
            ModelScorer(str(model_folder), tokenizer)
        two = self.save(tmp_path / "two", tokenizer, num_labels=2)
        with pytest.raises(UserError, match="its head has 2 labels, one is needed"):
            load_scorer([two], tokenizer)
        AutoModel.from_pretrained(model_folder).save_pretrained(tmp_path / "bare")
        with pytest.raises(UserError, match="is a LlamaModel, neither a sequence classification model nor a causal"):
            load_scorer([str(tmp_path / "bare")], tokenizer)
        with pytest.raises(UserError, match="must have the policy's vocabulary"):
            LikelihoodScorer(str(model_folder), character_tokenizer("abc", eos_token="[E]"))

    def test_too_long(self, folder, model_folder, tokenizer):
        long = sample("a" * 100, "b" * 40)
        for scorer in (ModelScorer(folder, tokenizer), LikelihoodScorer(str(model_folder), tokenizer)):
            with pytest.raises(
                UserError, match=r"takes 128 tokens, but there are 141, in the completion 'bbb.*\.\.\.'"
            ):
                scorer([long])

    def test_a_score_that_is_none(self, folder, tokenizer):
        scorer = ModelScorer(folder, tokenizer)
        scorer.scores.models[0].score.weight.fill_(math.nan)
        with pytest.raises(UserError, match="there is no reward"):
            scorer(SAMPLES)


def constant(*values: float):
    return lambda samples: list(values)


class TestCombined:
    def test_weighted_sum_and_means(self):
        nan = math.nan
        both = Combined([Part("a", constant(1, nan, 3, nan), 2.0), Part("b", constant(10, 20, nan, nan), -0.5)])
        assert both(SAMPLES) == pytest.approx([2 - 5, -10, 6, nan], nan_ok=True)
        assert both.means == {"a": 2.0, "b": 15.0}

    def test_each_normalised(self):
        both = Combined([Part("a", constant(1, 2, 3, 4), 2.0), Part("b", constant(100, 0, 0, 100), -1.0)], "normalized")
        standard = [
            (torch.tensor(v).double() - sum(v) / 4) / torch.tensor(v).double().std()
            for v in ([1, 2, 3, 4], [100, 0, 0, 100])
        ]
        assert both(SAMPLES) == pytest.approx((2 * standard[0] - standard[1]).tolist(), rel=1e-6)
        assert both.means == {"a": 2.5, "b": 50.0}

    def test_the_least_of_means_is_no_mean_of_minima(self):
        parts = [Part("a", constant(0, 9, 9, 9)), Part("b", constant(5, 5, 5, 4)), Part("c", constant(5, 5, 4, 5))]
        least = Combined(parts, "min")
        assert least(SAMPLES) == [5, 5, 5, 4]
        halved = Combined([parts[0]._replace(weight=0.5), *parts[1:]], "min")
        assert halved(SAMPLES) == [0, 4.5, 4.5, 4.5]
        nothing = Combined([Part("a", constant(math.nan)), Part("b", constant(math.nan))], "min")
        assert math.isnan(nothing(SAMPLES[:1])[0])

    def test_arguments(self):
        with pytest.raises(ValueError, match="distinct names"):
            Combined([Part("a", constant(1)), Part("a", constant(1))])
        with pytest.raises(ValueError, match="weights must be finite"):
            Combined([Part("a", constant(1), math.inf)])
        with pytest.raises(ValueError, match="one of 'sum', 'normalized', 'min', got 'max'"):
            Combined([Part("a", constant(1))], "max")  # type: ignore[arg-type]


class TestSpecifications:
    CODE = (
        "def a(completions):\n    return [*map(len, completions)]\n\n\ndef b(prompts):\n    return [1] * len(prompts)\n"
    )

    def test_several_with_weights(self, tmp_path, tokenizer, monkeypatch):
        path = file(tmp_path, self.CODE)
        monkeypatch.chdir(tmp_path)
        scorer = load_scorer([f"{path}:a", "rewards.py:b*-0.5"], tokenizer)
        assert [(part.name, part.weight) for part in scorer.parts] == [("a", 1.0), ("b", -0.5)]
        assert scorer(SAMPLES) == [1.5, 2.5, -0.5, 5.5] and scorer.means == {"a": 2.75, "b": 1.0}
        (tmp_path / "mine.py").write_text(self.CODE)
        assert load_scorer(["mine:a"], tokenizer)(SAMPLES) == [2, 3, 0, 6]
        # equal names are told apart by what was given
        both = load_scorer(["mine:a", "rewards.py:a"], tokenizer)
        assert [part.name for part in both.parts] == ["mine:a", "rewards.py:a"]

    @pytest.mark.parametrize(
        ("specs", "message"),
        [
            (["nowhere.py:f"], "nowhere.py: no such file"),
            (["fastpo.nowhere:f"], "cannot be imported: ModuleNotFoundError"),
            (["{path}:c"], "there is no function c (there are: a, b)"),
            (["{path}:a*much"], "must be a finite number"),
            (["{path}:a*inf"], "must be a finite number"),
            (["*2"], "must be a finite number"),
            (["{path}:a", "{path}:a*2"], "is given twice"),
            (["{path}"], "is no function"),
        ],
    )
    def test_mistakes(self, specs, message, tmp_path, tokenizer):
        path = file(tmp_path, self.CODE)
        with pytest.raises(UserError) as caught:
            load_scorer([spec.format(path=path) for spec in specs], tokenizer)
        assert message in str(caught.value)

    def test_a_module_that_raises(self, tmp_path, tokenizer):
        path = file(tmp_path, "1 / 0\n")
        for _ in range(2):
            with pytest.raises(UserError, match="cannot be imported: ZeroDivisionError: division by zero"):
                load_scorer([f"{path}:a"], tokenizer)


class TestJudges:
    FIRST, SECOND = [sample("a", "ccc"), sample("b", "c")], [sample("a", "b"), sample("b", "cdef")]

    def test_bradley_terry(self):
        judge = BradleyTerryJudge(lambda samples: [len(s.completion) for s in samples], temperature=2.0)
        assert judge(self.FIRST, self.SECOND) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1.5))])
        for temperature in (0.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="temperature must be positive"):
                BradleyTerryJudge(constant(1), temperature)

    def test_a_function_that_judges(self, tmp_path, tokenizer):
        code = "def longer(first, second, bonus):\n    return [(a > b) * c for a, b, c in zip(first, second, bonus)]\n"
        spec = file(tmp_path, code) + ":longer"
        first = [s._replace(row={"bonus": 0.5 + n / 2}) for n, s in enumerate(self.FIRST)]
        judge = load_judge([spec], tokenizer)
        assert isinstance(judge, FunctionJudge) and judge(first, self.SECOND) == [0.5, 0.0]
        with pytest.raises(UserError, match=f"{spec}: 3 is no probability, for the completion 'ccc' .* against 'b'"):
            judge([first[0]._replace(row={"bonus": 3})], self.SECOND[:1])

    def test_rewards_become_a_judge(self, tmp_path, tokenizer):
        spec = file(tmp_path, TestSpecifications.CODE) + ":a*0.5"
        judge = load_judge([spec], tokenizer)
        assert judge(self.FIRST, self.SECOND) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1.5))])

    def test_every_sample_needs_a_reward(self):
        judge = BradleyTerryJudge(constant(1, 2, math.nan, 4))
        with pytest.raises(ValueError, match=r"a judge needs a reward for every sample, there is none for .* 'b'"):
            judge(self.FIRST, self.SECOND)

    def test_pairs_have_one_prompt(self):
        for judge in (BradleyTerryJudge(constant(1, 2, 3, 4)), FunctionJudge(lambda first, second: [1, 1], "f")):
            with pytest.raises(ValueError, match="different prompts: 'a' and 'b'"):
                judge(self.FIRST, self.SECOND[::-1])
            with pytest.raises(ValueError, match="second has 1 samples, first has 2"):
                judge(self.FIRST, self.SECOND[:1])


def test_no_samples(model_folder, tokenizer):
    function = FunctionScorer(lambda completions, solution: 1 / 0, "f")
    scorer = Combined([Part("a", function), Part("b", LikelihoodScorer(str(model_folder), tokenizer))])
    assert scorer([]) == [] and math.isnan(scorer.means["a"])
    assert BradleyTerryJudge(scorer)([], []) == FunctionJudge(lambda first, second: 1 / 0, "f")([], []) == []


class TestTask:
    def answers(self, *texts: str) -> list[Sample]:
        return [Sample("7+5=", text, [], [], True, {}) for text in texts]

    def test_the_verifier(self):
        assert task.near(self.answers("12", "11", "14", "=", "")) == [1, 1 / 2, 1 / 3, 1 / 39, 1 / 39]

    def test_the_judge_knows_the_optimum(self):
        right, wrong = self.answers("12", "12"), self.answers("11", "12")
        assert task.judge()(right, wrong) == pytest.approx([1 / (1 + math.exp(-2)), 0.5])

    def test_the_cyclic_judge_has_no_best_answer(self):
        texts = [str(n) for n in range(39)]
        table = torch.tensor([task.CyclicJudge()(self.answers(*[a] * 39), self.answers(*texts)) for a in texts])
        torch.testing.assert_close(table + table.T, torch.ones(39, 39))
        assert float(table.mean(1).max()) == pytest.approx(0.5)
        assert [float(table[i, j]) for i, j in ((0, 1), (1, 2), (2, 0))] == pytest.approx([0.9] * 3)
        assert task.CyclicJudge()(self.answers("7", "+", "+"), self.answers("=", "7", "=")) == pytest.approx(
            [0.9, 0.1, 0.5]
        )
