"""Compiled updates are the eager ones, to the last digits."""

import gc
import pickle
import warnings
import weakref
from functools import partial

import lightning
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lightning import Callback
from probes import ConstantReward, Spaces, Uneven
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, InputError, PopArt, PPOLoss
from ppo_lightning.algorithm.update import Updater
from ppo_lightning.compiler import CompiledFunction, CompilerError, CudaGraphCache
from ppo_lightning.envs.classic_control import CartPole, Pendulum
from ppo_lightning.rollout.collectors import TensorCollector

SIZE = {"num_envs": 4, "num_steps": 32}


def trained(fit, env, iterations=10, *, eager=False, seed=1, **options) -> PPO:
    lightning.seed_everything(seed, verbose=False)
    options = {**SIZE, **options}
    steps = iterations * options["num_envs"] * options["num_steps"]
    model = PPO(env, total_steps=steps, compile=not eager, **options)
    fit(model)
    assert (model.updater.compiled is None) == eager
    return model


def parameters(model: PPO) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def cycle(optimizer):
    """Cycles Adam's first decay, too."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=20)


def frozen(*spaces):
    network = ActorCritic(*spaces)
    network.action_head.log_std.requires_grad_(False)
    return network


CASES = {
    "plain": ("CartPole-v1", {}),
    "everything": (
        "Pendulum-v1",
        {
            "normalize_observation": True,
            "popart": PopArt(),
            "clip_range_vf": 0.2,
            "ent_coef": 0.01,
            "num_minibatches": 3,  # of unequal size
            "max_grad_norm": None,
            "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-3, betas=(0.8, 0.99), weight_decay=0.1),
        },
    ),
    "halves": ("CartPole-v1", {"target_kl": 1e-4, "optimizer": partial(torch.optim.Adam, lr=1e-3, weight_decay=0.1)}),
    "tanh": ("Pendulum-v1", {"policy": partial(ActorCritic, distribution="tanh", shared=True)}),
    "beta": ("Pendulum-v1", {"policy": partial(ActorCritic, distribution="beta"), "lr_scheduler": cycle}),
    "beyond the bounds": (  # where gradients pull back alone
        "Pendulum-v1",
        {
            "policy": partial(ActorCritic, log_std_range=(-1e-3, 1e-3)),
            "optimizer": partial(torch.optim.Adam, lr=3e-3),
            "ent_coef": 0.01,
        },
    ),
    "critic of other sizes": ("CartPole-v1", {"policy": partial(ActorCritic, critic_hidden_sizes=(16, 8))}),
    "std of each state": (
        "Pendulum-v1",
        {
            "policy": partial(ActorCritic, state_dependent_std=True, log_std_init=-1.0),
            "normalize_observation": True,
            "ent_coef": 0.01,
        },
    ),
    "gsde beyond the bounds": (
        "Pendulum-v1",
        {"policy": partial(ActorCritic, distribution="gsde", log_std_range=(-1e-3, 1e-3)), "ent_coef": 0.01},
    ),
    "decoupled": (
        "CartPole-v1",
        {"optimizer": partial(torch.optim.Adam, lr=1e-3, weight_decay=0.5, decoupled_weight_decay=True)},
    ),
    "recomputed": ("Pendulum-v1", {"recompute_advantages": True, "clip_range_vf": 0.2, "num_minibatches": 3}),
    "recomputed between halves": (
        "CartPole-v1",
        {
            "recompute_advantages": True,
            "target_kl": 1e-4,
            "vectorization": "vector_entry_point",
            "optimizer": partial(torch.optim.Adam, lr=1e-3),
        },
    ),
    "frozen": ("Pendulum-v1", {"policy": frozen}),
    "dummy rows": ("CartPole-v1", {"vectorization": "vector_entry_point", "num_minibatches": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_eager_over_ten_iterations(fit, case):
    env, options = CASES[case]
    eager, compiled = trained(fit, env, eager=True, **options), trained(fit, env, **options)
    assert_close(parameters(compiled), parameters(eager), atol=1e-5, rtol=1e-5)
    assert int(compiled.n_updates) == int(eager.n_updates)
    assert compiled.num_env_steps == eager.num_env_steps
    assert compiled.trainer.global_step == eager.trainer.global_step == int(eager.iterations)
    if "halves" in case:  # or the stop was not tested
        assert int(eager.n_updates) < 40
    for name in ("loss", "value_loss", "approx_kl", "clip_fraction", "grad_norm", "entropy_loss"):
        one, other = (model.trainer.callback_metrics[f"train/{name}"] for model in (compiled, eager))
        assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("env", [CartPole, Pendulum])
def test_compiled_rollouts_of_tensors_equal_eager_ones(fit, env, monkeypatch):
    monkeypatch.setattr(TensorCollector, "MAX_UNROLLED", 2)  # which compiles sooner
    eager, compiled = trained(fit, env, 6, eager=True, num_steps=10), trained(fit, env, 6, num_steps=10)
    assert compiled.rollouts.collector is None  # the run closed it
    assert_close(parameters(compiled), parameters(eager), atol=1e-5, rtol=1e-5)


def test_a_rollout_of_one_graph_is_that_of_single_steps():
    """Episodes end in it, of one length or another; 21 steps are three graphs of seven."""
    batches = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = PPO(partial(CartPole, max_episode_steps=6), compile=compile, num_envs=5, num_steps=21)
        model.seed = 3
        batches += [model.rollouts.collect().clone() for _ in range(2)][1:]
        batches[-1]["finished"] = model.rollouts.episodes.finished[:, :2].mean(0).expand(21, 5, 2)
        assert model.rollouts.collector.compiles == compile
    one, other = batches
    assert one["truncated"].any()
    assert set(one.keys()) == set(other.keys())
    for key in set(one.keys()) - {"policy_version"}:
        assert_close(one[key], other[key], atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_checkpoints_are_the_same_and_resume_either_way(fit, tmp_path):
    ends = []
    for first in (False, True):
        half = trained(fit, "CartPole-v1", 3, eager=first, lr_scheduler=constant)
        path = tmp_path / f"{first}.ckpt"
        half.trainer.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)
        state = saved["optimizer_states"][0]["state"]
        assert {float(own["step"]) for own in state.values()} == {48.0}
        ends.append((saved["state_dict"], {key: own["exp_avg_sq"] for key, own in state.items()}))
        for second in (False, True):
            model = PPO("CartPole-v1", total_steps=6 * 128, compile=not second, lr_scheduler=constant, **SIZE)
            fit(model, ckpt_path=path)
            ends.append(parameters(model))
    assert_close(ends[0], ends[3], atol=1e-6, rtol=1e-5)
    for other in (ends[2], ends[4], ends[5]):
        assert_close(other, ends[1], atol=1e-5, rtol=1e-5)


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


class Extreme(ConstantReward):
    """Rewards that overflow the loss."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, 1e30, *rest


def test_no_step_is_taken_by_a_gradient_that_is_not_finite(fit):
    torch.manual_seed(0)
    model = PPO(Extreme, total_steps=256, compile=True, **SIZE)
    before = parameters(model)
    with pytest.raises(FloatingPointError, match=r"the gradient.s norm is (inf|nan) in iteration 1"):
        fit(model)
    assert_close(parameters(model), before, rtol=0, atol=0)


class Hooked(Callback):
    def on_before_optimizer_step(self, *args):
        pass


def mixed(*spaces):
    network = ActorCritic(*spaces)
    network.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    return network


def watched(*spaces):
    network = ActorCritic(*spaces)
    network.value_head.weight.register_hook(lambda gradient: gradient * 0)
    return network


@pytest.mark.parametrize(
    ("options", "trainer", "reason"),
    [
        ({"policy": partial(ActorCritic, rnn="gru")}, {}, "the policy is recurrent"),
        ({"optimizer": partial(torch.optim.SGD, lr=1e-3)}, {}, "the optimizer is SGD, not Adam or AdamW"),
        ({"optimizer": partial(torch.optim.Adam, amsgrad=True)}, {}, "the optimizer uses amsgrad or maximize"),
        ({}, {"callbacks": [Hooked()]}, "Hooked has hooks around gradients"),
        (
            {"optimizer": lambda ps: torch.optim.Adam(list(ps)[:2])},
            {},
            "the optimizer does not have all parameters of policy and loss",
        ),
        ({"policy": mixed}, {}, "the parameters have several dtypes"),
        ({"policy": watched}, {}, "parameters have hooks on their gradients"),
    ],
)
def test_what_cannot_be_compiled_runs_eager_and_says_so(fit, options, trainer, reason):
    model = PPO("CartPole-v1", total_steps=128, compile=True, **SIZE, **options)
    with pytest.warns(UserWarning, match=f"compile: true has no effect on the update, since {reason}"):
        fit(model, **trainer)
    assert model.num_env_steps == 128


def test_without_a_compiler_training_continues_as_without_compile(fit, monkeypatch, tmp_path):
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    eager = trained(fit, "CartPole-v1", 2, eager=True)
    lightning.seed_everything(1, verbose=False)
    model = PPO("CartPole-v1", total_steps=256, compile=True, **SIZE)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with inductor.patch({"cpp.cxx": ("/no/such/compiler",)}):
            fit(model)
    sentences = [str(one.message) for one in told if "compile: true" in str(one.message)]
    assert len(sentences) == 2  # of values, and of the update
    assert all("since torch could not compile it" in sentence and "\n" not in sentence for sentence in sentences)
    assert_close(parameters(model), parameters(eager), rtol=0, atol=0)
    assert model.trainer.global_step == 2


class Own(PPO):
    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)


class Scaled(PPOLoss):
    def forward(self, batch, evaluate, coefficients):
        losses = super().forward(batch, evaluate, coefficients)
        return {**losses, "loss": losses["loss"] * 0.5}


def test_hooks_and_losses_of_ones_own_are_used(fit):
    model = Own("CartPole-v1", total_steps=128, compile=True, **SIZE)
    with pytest.warns(UserWarning, match="since Own has hooks around gradients"):
        fit(model)
    norms = []
    for compile in (False, True):
        lightning.seed_everything(1, verbose=False)
        model = PPO("CartPole-v1", loss=Scaled(), total_steps=256, compile=compile, **SIZE)
        fit(model)
        norms.append(float(model.trainer.callback_metrics["train/grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_many_models_of_one_process_are_all_compiled(fit):
    """torch limits the graphs of each function, and models have their functions in common."""
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        for index in range(3):
            model = PPO(
                "CartPole-v1", total_steps=64, compile=True, num_envs=2, num_steps=32, max_grad_norm=0.1 + index
            )
            fit(model)
            assert model.updater.compiled is not None


def test_a_compiled_model_can_be_pickled(fit):
    model = trained(fit, "CartPole-v1", 1)
    model.trainer = None
    assert_close(parameters(pickle.loads(pickle.dumps(model))), parameters(model), rtol=0, atol=0)


def test_steps_that_were_taken_are_taken_back(fit, monkeypatch):
    """The compiler may fail at a later minibatch, of another size."""
    eager = trained(fit, "CartPole-v1", 2, eager=True, num_minibatches=3)
    lightning.seed_everything(1, verbose=False)
    model = PPO("CartPole-v1", total_steps=256, compile=True, num_minibatches=3, **SIZE)
    prepare = Updater.prepare

    def broken(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        whole, calls = self.compiled.fused_graph.repeat, []

        def fails(*batch):
            calls.append(1)
            if len(calls) == 3:
                raise CompilerError("it is tired")
            return whole(*batch)

        self.compiled.fused_graph.repeat = fails

    monkeypatch.setattr(Updater, "prepare", broken)
    with pytest.warns(UserWarning, match="since it is tired"):
        fit(model)
    assert_close(parameters(model), parameters(eager), atol=1e-6, rtol=1e-6)


class Doubled(CartPole):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, 2 * reward, *rest


def test_an_environment_with_a_step_of_its_own_is_stepped_by_it():
    model = PPO(Doubled, compile=True, **SIZE)
    with pytest.warns(UserWarning, match="no effect on rollouts, since Doubled has step of its own"):
        batch = model.rollouts.collect()
    assert (batch["reward"] == 2).all()


def test_compile_is_true_false_or_auto():
    with pytest.raises(InputError, match="compile must be true, false or auto, got 'no'"):
        PPO("CartPole-v1", compile="no")


# --- gradients in parts ------------------------------------------------------------------------------------------------


def memory(observation_space, action_space):
    return ActorCritic(observation_space, action_space, rnn="gru")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_advantage": False, "clip_range_vf": 0.2},
        {"policy": memory, "sequence_length": 4, "env": "next step"},
        {"compile": True},
        {"target_kl": 1e-4},
    ],
)
def test_a_minibatch_in_parts_takes_the_same_steps(fit, options):
    env = options.pop("env", "CartPole-v1")
    if env == "next step":  # whose dummy rows are spread unevenly over the parts
        env = partial(SyncVectorEnv, [Uneven] * 4, autoreset_mode=AutoresetMode.NEXT_STEP)
    models = []
    for chunks in (1, 3):
        lightning.seed_everything(1, verbose=False)
        model = PPO(env, total_steps=2 * 128, gradient_accumulation_steps=chunks, **SIZE, **options)
        fit(model)
        models.append(model)
    assert_close(parameters(models[1]), parameters(models[0]), atol=1e-6, rtol=1e-6)
    for name in ("loss", "policy_gradient_loss", "value_loss", "approx_kl", "entropy_loss", "grad_norm"):
        one, other = (model.trainer.callback_metrics[f"train/{name}"] for model in models)
        assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_parts_take_less_memory_at_once(fit):
    """The network never sees more than a part."""
    seen = []

    class Watched(ActorCritic):
        def forward(self, observation, state=None, start=None):
            if torch.is_grad_enabled():
                seen.append(len(observation))
            return super().forward(observation, state, start)

    model = PPO("CartPole-v1", total_steps=128, gradient_accumulation_steps=4, policy=Watched, **SIZE)
    seen.clear()  # of what the network was tried with
    fit(model)
    assert set(seen) == {8}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, which captures graphs")
@pytest.mark.parametrize("env", ["CartPole-v1", partial(CartPole, device="cuda"), partial(Pendulum, device="cuda")])
def test_captured_and_eager_learn_alike_on_cuda(fit, env):
    ends = []
    for compile in (False, True):
        lightning.seed_everything(1, verbose=False)
        model = PPO(env, total_steps=10 * 128, compile=compile, **SIZE)
        fit(model, accelerator="cuda", devices=1)
        ends.append(parameters(model).cpu())
    assert_close(ends[1], ends[0], atol=1e-3, rtol=1e-3)


def test_products_of_graphs_are_those_of_torch(monkeypatch, tmp_path):
    """Whichever way they are computed: a product of few columns is transposed."""
    from torch._inductor.utils import run_and_get_code

    from ppo_lightning import compiler

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = PPO("CartPole-v1", **SIZE)

    def products(x, g, weight, bias):
        return torch.addmm(bias, x, weight), g.T @ x[:, :4].contiguous(), (x + 1) @ weight

    arguments = torch.randn(2048, 64), torch.randn(2048, 64), torch.randn(64, 64), torch.randn(64)
    with torch.no_grad():
        results, code = run_and_get_code(CompiledFunction(products, model.policy), *arguments)
        monkeypatch.setattr(compiler, "NARROW", 0)
        untouched, as_written = run_and_get_code(CompiledFunction(products, model.policy), *arguments)
    for one, other, third in zip(results, products(*arguments), untouched, strict=True):
        assert_close(one, other, atol=1e-3, rtol=1e-4)
        assert_close(third, other, atol=1e-3, rtol=1e-4)
    assert code != as_written


@pytest.mark.parametrize(
    ("options", "enabled"),
    [
        ({"total_steps": 3_000_000}, False),
        ({"total_steps": 4_000_000}, True),
        ({"total_steps": 4_000_000, "num_envs": 16}, False),  # half as many iterations
        ({"total_steps": 1_000_000, "update_epochs": 16}, True),
        ({"total_steps": 128, "compile": True}, True),
        ({"total_steps": 4_000_000, "compile": False}, False),
    ],
)
def test_auto_compiles_runs_of_fifty_thousand_gradient_steps(options, enabled):
    assert PPO("CartPole-v1", **options).updater.compilation.enabled is enabled


def test_auto_does_not_compile_convolutions():
    model = PPO(partial(Spaces, "image"), total_steps=10_000_000)
    assert not model.updater.compilation.enabled
    assert "convolutions" in model.updater.compilation.decision


def test_auto_compiles_on_a_cpu_alone_and_reports_so(reported):
    compilation = PPO("CartPole-v1", total_steps=4_000_000).updater.compilation
    assert compilation.is_on(torch.device("cpu"))
    assert not compilation.is_on(torch.device("cuda"))
    compilation.report(torch.device("cuda"))
    assert reported == ["compile: auto trains in eager mode on cuda: compile: true compiles there, too"]
    assert PPO("CartPole-v1", compile=True).updater.compilation.is_on(torch.device("cuda"))


@pytest.fixture
def reported(monkeypatch):
    """What the run reports of compiling, beside warnings."""
    messages: list[str] = []
    monkeypatch.setattr("ppo_lightning.compiler.rank_zero_info", messages.append)
    return messages


def test_auto_is_the_compiled_run_bit_for_bit_and_reports_its_decision(fit, monkeypatch, reported):
    compiled = trained(fit, "CartPole-v1", 3)
    assert reported == []
    monkeypatch.setattr("ppo_lightning.compiler.PAYS_OFF_FROM", 48)
    lightning.seed_everything(1, verbose=False)
    model = PPO("CartPole-v1", total_steps=3 * 128, **SIZE)
    fit(model)
    assert torch.equal(parameters(model), parameters(compiled))
    assert reported == ["compile: auto compiles 48 gradient steps"]


def test_auto_leaves_what_cannot_be_compiled_in_eager_mode_without_a_warning(fit, monkeypatch, reported):
    monkeypatch.setattr("ppo_lightning.compiler.PAYS_OFF_FROM", 1)
    model = PPO("CartPole-v1", policy=partial(ActorCritic, rnn="gru"), total_steps=128, **SIZE)
    fit(model)
    assert model.num_env_steps == 128
    assert reported[-1] == "compile: auto has no effect on the update, since the policy is recurrent"


def test_a_loss_that_is_recompiled_in_each_iteration_continues_in_eager_mode(fit, monkeypatch):
    class Annealed(PPOLoss):
        weight = 1.0

        def forward(self, batch, evaluate, coefficients):
            losses = super().forward(batch, evaluate, coefficients)
            return {**losses, "loss": losses["loss"] * self.weight}

    class Anneal(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            model.loss.weight *= 0.9

    def train(**options):
        lightning.seed_everything(1, verbose=False)
        model = PPO("CartPole-v1", total_steps=5 * 128, loss=Annealed(), **SIZE, **options)
        fit(model, callbacks=[Anneal()])
        return model

    monkeypatch.setattr("ppo_lightning.compiler.MAX_GRAPHS", 3)
    with pytest.warns(
        UserWarning, match="no effect on the update, since after 3 graphs it would be compiled again: a value"
    ):
        model = train(compile=True)
    assert model.updater.compiled is None
    assert_close(parameters(model), parameters(train(compile=False)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [{}, {"target_kl": 1.0}])
def test_a_loss_that_counts_its_calls_is_not_taken_for_the_same(fit, own):
    """Repeated calls do not check what graphs depend on, unless that changes: here the third call doubles the loss."""

    class Third(PPOLoss):
        def __init__(self, calls):
            super().__init__()
            self.calls = calls

        def forward(self, batch, evaluate, coefficients):
            self.calls = (self.calls + 1) % 3
            losses = super().forward(batch, evaluate, coefficients)
            return {**losses, "loss": losses["loss"] * 2} if self.calls == 0 else losses

    def train(*, compile):
        lightning.seed_everything(1, verbose=False)
        options = {
            **SIZE,
            "num_minibatches": 1,
            "update_epochs": 4,
            "max_grad_norm": None,
            **own,
        }  # an epoch is one call
        loss = Third(-1 if compile else 0)  # a compiled step calls it once more
        optimizer = partial(torch.optim.AdamW, lr=1e-3, eps=1e-1)  # which does not undo a factor of the gradient
        model = PPO("CartPole-v1", total_steps=4 * 128, loss=loss, optimizer=optimizer, compile=compile, **options)
        fit(model)
        return model

    compiled, eager = train(compile=True), train(compile=False)
    assert compiled.updater.compiled is not None
    assert_close(parameters(compiled), parameters(eager), rtol=1e-4, atol=1e-5)


def test_a_loss_sees_what_comes_into_the_rollout_later(fit):
    """A key that it asks for, and that is not there at first."""

    class Asks(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            losses = super().forward(batch, evaluate, coefficients)
            more = batch.get("more")
            factor = (2.0 if "bonus" in batch else 1.0) + (0.0 if more is None else more.mean())
            return {**losses, "loss": losses["loss"] * factor}

    class Adds(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            if model.iterations >= 2:
                batch["bonus"], batch["more"] = batch["reward"].clone(), torch.full_like(batch["reward"], 3.0)

    def train(*, compile):
        lightning.seed_everything(1, verbose=False)
        optimizer = partial(torch.optim.AdamW, lr=1e-3, eps=1e-1)
        options = {**SIZE, "max_grad_norm": None, "optimizer": optimizer}
        model = PPO("CartPole-v1", total_steps=4 * 128, loss=Asks(), compile=compile, **options)
        fit(model, callbacks=[Adds()])
        assert (model.updater.compiled is None) != compile
        return parameters(model)

    assert_close(train(compile=True), train(compile=False), rtol=1e-5, atol=1e-5)


def test_a_loss_may_need_as_many_samples_as_a_minibatch_has(fit):
    class Best(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            losses = super().forward(batch, evaluate, coefficients)
            return {**losses, "best": batch["advantage"].topk(16).values.mean()}

    model = trained(fit, "CartPole-v1", 2, loss=Best())
    assert model.trainer.callback_metrics["train/best"] > 0


class Captures:
    """Stands for a CUDA graph: counts those that are captured."""

    count = 0

    def __init__(self, function):
        Captures.count, self.function = Captures.count + 1, function

    def __call__(self, *args):
        return self.function(*args)


def test_a_captured_function_converts_its_weights_in_each_call(monkeypatch):
    """Autocast would convert them once, and the graph read what was converted then."""
    monkeypatch.setattr("ppo_lightning.compiler.CudaGraphModule", Captures)
    layer = torch.nn.Linear(2, 2)
    seen = []
    function = CudaGraphCache(lambda rows: seen.append(torch.is_autocast_cache_enabled()) or layer(rows), layer)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = function(torch.ones(1, 2))
        layer.weight.mul_(2)
        assert not torch.equal(function(torch.ones(1, 2)), before)
        assert torch.is_autocast_cache_enabled()
    assert seen == [False, False]


def test_what_a_captured_graph_depends_on_is_checked_again(monkeypatch):
    """Each combination of shapes is captured once, and again where what it depends on has changed."""
    monkeypatch.setattr("ppo_lightning.compiler.CudaGraphModule", Captures)
    model, Captures.count = Scale(), 0
    function = CompiledFunction(model.plain, model)
    function.captures = True
    captured = []
    with torch.no_grad():
        for call in range(32):
            if call % 4 == 0:
                function.check_again()
            if call == 16:
                model.weight = torch.nn.Parameter(torch.full((3,), 2.0))
            if call == 24:  # the same object elsewhere
                model.weight.data = torch.full((3,), 3.0)
            rows = {"rows": torch.randn(2 + call % 2, 3), "more": {"one": torch.tensor(1.0)}}
            assert_close(function.repeat(rows), model.plain(rows))
            captured.append(Captures.count)
    assert captured[:4] == [0] * 4
    assert captured[15] == captured[19] == 2
    assert captured[23] == 4
    assert captured[-1] == 6


class Scale(torch.nn.Module):
    """What a compiled function may depend on, or leave behind."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.factor, self.kept, self.calls = torch.ones(3), torch.zeros(3), 0

    def plain(self, rows):
        return {"rows": rows["rows"] * self.weight, "sum": rows["rows"].sum() + rows["more"]["one"]}

    def replaces_a_tensor(self, rows):
        return self.plain({**rows, "rows": rows["rows"] * self.factor})

    def keeps_a_tensor(self, rows):
        self.kept = rows["rows"] + 1
        return self.plain(rows)

    def counts(self, rows):
        self.calls = (self.calls + 1) % 3
        return self.plain({**rows, "rows": rows["rows"] * (2 if self.calls == 0 else 1)})

    def returns_an_argument(self, rows):
        return {**self.plain(rows), "same": rows["rows"]}


@pytest.mark.parametrize(
    ("name", "checked"),
    [("plain", 9), ("replaces_a_tensor", 16), ("keeps_a_tensor", 16), ("counts", 16), ("returns_an_argument", 16)],
)
def test_a_graph_is_called_alone_only_where_that_is_the_same(name, checked):
    """Of four times four calls the first four are checked, and then the first with each shape: two, two and one.

    Where something changes, all are.
    """
    ours, eager = Scale(), Scale()
    function = CompiledFunction(getattr(ours, name), ours)
    with torch.no_grad(), torch.profiler.profile() as profile:
        for call in range(16):
            if call % 4 == 0:
                function.check_again()
            for one in (ours, eager):
                one.weight.data = torch.full((3,), call - 4.0)
                one.factor = torch.full((3,), call + 1.0)
            rows = {"rows": torch.randn(2 + call % 2 * (call < 12), 3), "more": {"one": torch.tensor(1.0)}}
            found, expected = function.repeat(rows), getattr(eager, name)(rows)
            assert_close(found, expected)
            assert_close(ours.kept, eager.kept)
            assert ours.calls == eager.calls
    assert sum(event.name.startswith("Torch-Compiled Region") for event in profile.events()) == checked


@pytest.mark.parametrize("sizes", [[3, 3, 2], [2, 3, 4]])
def test_a_function_that_alternates_is_always_checked(sizes):
    """Its first call of an update is always the same, and so is each call of a size of its own."""

    class Alternates(Scale):
        def forward(self, rows):
            self.calls = 1 - self.calls
            return rows * self.weight * (1 + self.calls)

    ours, eager = Alternates(), Alternates()
    function = CompiledFunction(ours.forward, ours)
    with torch.no_grad():
        for _ in range(5):
            function.check_again()
            ours.calls = eager.calls = 0
            for size in sizes * 2:
                rows = torch.randn(size, 3)
                assert_close(function.repeat(rows), eager(rows))


def test_a_compiled_model_is_freed():
    model = Scale()
    function = CompiledFunction(model.plain, model)
    rows = {"rows": torch.randn(2, 3), "more": {"one": torch.tensor(1.0)}}
    with torch.no_grad():
        for call in range(9):
            if call % 3 == 0:
                function.check_again()
            function.repeat(rows)
    left = [weakref.ref(one) for one in (model, function, model.weight, rows["rows"])]
    del model, function, rows
    gc.collect()
    assert [one() for one in left] == [None] * 4


@pytest.mark.filterwarnings("ignore:compile. true has no effect on the update:UserWarning")
def test_a_loss_is_called_as_often_as_there_are_minibatches(fit):
    """Where it cannot be compiled, too, since it changes a buffer."""

    class Counts(PPOLoss):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, batch, evaluate, coefficients):
            self.calls.add_(1)
            return super().forward(batch, evaluate, coefficients)

    model = PPO("CartPole-v1", total_steps=256, loss=Counts(), compile=True, **SIZE)
    fit(model)
    assert model.loss.calls == 2 * 4 * 4
