import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import lightning
import numpy as np
import pytest
import torch
import yaml

from ppo_lightning import PPO
from ppo_lightning.__main__ import run
from ppo_lightning.arguments import COMMANDS
from ppo_lightning.cli import CLI_OPTIONS, PPOCLI, main
from ppo_lightning.errors import InputError

ROOT = Path(__file__).parent.parent
SMALL = [
    "--model.env", "CartPole-v1", "--model.num_envs", "4", "--model.num_steps", "32", "--model.num_eval_episodes", "2",
    "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false",
]  # fmt: skip
RUN = Path("lightning_logs/version_0")


def fit(*flags: str) -> None:
    main(["fit", *SMALL, "--model.total_steps", "512", *flags])


def fails(*words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code not in (0, None)
    return str(caught.value.code)


def table() -> np.ndarray:
    return np.genfromtxt(RUN / "metrics.csv", delimiter=",", names=True, deletechars="")


@pytest.mark.paints
def test_a_run_leaves_its_config_logs_checkpoints_and_picture(capsys):
    main(["fit", *SMALL, "--model.total_steps", "512", "--seed_everything", "4"])
    names = {path.name for path in RUN.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "learning_curve.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in (RUN / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["seed_everything"] == 4
    assert config["model"]["total_steps"] == 512
    said = capsys.readouterr().out
    assert "trained 512 environment steps" in said
    for place in ("lightning_logs/version_0", "checkpoints", "learning_curve.png", "tensorboard --logdir"):
        assert place in said


def test_a_run_can_be_repeated_from_the_config_that_it_left(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED")
    fit()  # with a seed that is drawn
    monkeypatch.delenv("PL_GLOBAL_SEED")
    main(["fit", "--config", str(RUN / "config.yaml")])
    first, second = (
        torch.load(f"lightning_logs/version_{version}/checkpoints/last.ckpt")["state_dict"] for version in (0, 1)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_validate_and_test_print_the_evaluation(capsys):
    fit()
    for command in ("validate", "test"):
        main([command, "--ckpt_path", str(RUN / "checkpoints/best.ckpt"), "--trainer.accelerator", "cpu"])
        assert "eval/mean_reward" in capsys.readouterr().out
    assert sorted(path.name for path in Path("lightning_logs").iterdir()) == ["version_0"]


def test_the_command_line_wins_over_the_checkpoint_and_the_checkpoint_over_defaults(monkeypatch):
    fit("--model.gamma", "0.9", "--model.clip_range", "0.3", "--model.policy.hidden_sizes", "[16]")
    import ppo_lightning.cli as cli

    models = []
    monkeypatch.setattr(cli.PPOCLI, "after_fit", lambda self: models.append(self.model))
    last = str(RUN / "checkpoints/last.ckpt")
    main(["fit", "--ckpt_path", last, "--model.total_steps", "640", "--model.clip_range", "0.1", *SMALL])
    (model,) = models
    assert (model.gamma, model.schedules["clip_range"].start, model.total_steps) == (0.9, 0.1, 640)
    assert model.num_env_steps == 640


def test_a_resumed_run_resumes_in_its_own_folder_and_loses_no_row():
    fit()
    before, best = table(), torch.load(RUN / "checkpoints/best.ckpt")["callbacks"]["BestCheckpoint"]["best_model_score"]
    main(["fit", *SMALL, "--ckpt_path", "last", "--model.total_steps", "1024"])
    after = table()
    kept = torch.load(RUN / "checkpoints/last.ckpt")["callbacks"]["BestCheckpoint"]["best_model_score"]
    assert kept >= best
    assert kept == np.nanmax(after["eval/mean_reward"])
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]
    assert after["step"].tolist() == before["step"].tolist() + [step for step in after["step"] if step > 512]
    assert after["step"].max() == 1024
    assert (RUN / "config.yaml").exists()


def test_a_checkpoint_may_be_named_in_the_config():
    fit("--model.gamma", "0.9", "--trainer.default_root_dir", "runs")
    Path("more.yaml").write_text("trainer: {default_root_dir: runs}\nckpt_path: last\nmodel: {total_steps: 640}\n")
    main(["fit", "--config", "more.yaml", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"])
    state = torch.load("runs" / RUN / "checkpoints/last.ckpt")
    assert state["state_dict"]["env_steps"] == 640
    assert state["hyper_parameters"]["gamma"] == 0.9
    assert [path.name for path in Path("runs/lightning_logs").iterdir()] == ["version_0"]


def test_a_vector_env_by_class_path_is_trained_and_evaluated():
    Path("native.yaml").write_text(
        "model:\n  env:\n    class_path: gymnasium.envs.classic_control.cartpole.CartPoleVectorEnv\n  num_envs: 4\n"
        "  num_steps: 32\n  total_steps: 256\n"
    )
    main(["fit", "--config", "native.yaml", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"])
    assert (RUN / "checkpoints/best.ckpt").exists()


def test_one_improvement_after_resuming_replaces_the_best_checkpoint():
    """The old file is known by a relative path, the new one by an absolute path: they are the same."""
    fit("--model.eval_interval", "1", "--seed_everything", "1")
    best = RUN / "checkpoints/best.ckpt"
    before = torch.load(best)["callbacks"]["BestCheckpoint"]["best_model_score"]
    resumed = ["--model.total_steps", "6016", "--model.eval_interval", "1000", "--seed_everything", "1"]
    main(["fit", *SMALL, "--ckpt_path", "last", *resumed, "--model.optimizer.lr", "0.003"])
    assert torch.load(best)["callbacks"]["BestCheckpoint"]["best_model_score"] > before


def test_the_last_word_counts_its_episodes(capsys):
    fit("--model.env_kwargs.max_episode_steps", "16", "--model.total_steps", "128")
    episodes = torch.load(RUN / "checkpoints/last.ckpt")["ppo_lightning"]["episodes"]
    assert 8 <= len(episodes) < 100
    assert f"over {len(episodes)} episodes" in capsys.readouterr().out


def test_last_is_the_newest_checkpoint_that_can_be_read():
    fit()
    fit()
    for name in ("last.ckpt", "previous.ckpt"):
        Path("lightning_logs/version_1/checkpoints", name).write_bytes(b"cut")
    from ppo_lightning.runs.checkpoint import newest_checkpoint

    with pytest.warns(UserWarning, match=r"passes over a file: .*version_1.* is no checkpoint that can be read"):
        assert newest_checkpoint(".").parts[-3:] == ("version_0", "checkpoints", "last.ckpt")


def test_no_checkpoint_to_resume_from_is_an_error():
    assert "there is no last.ckpt below" in fails("fit", *SMALL, "--ckpt_path", "last")
    assert "there is no checkpoint at nowhere.ckpt" in fails("fit", *SMALL, "--ckpt_path", "nowhere.ckpt")
    Path("text.ckpt").write_text("hello")
    assert "text.ckpt is no checkpoint" in fails("fit", *SMALL, "--ckpt_path", "text.ckpt")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model.env", "CartPol-v1"], "error: there is no environment 'CartPol-v1': did you mean CartPole-v1"),
        (["--model.num_steps", "0"], "error: num_steps must be a whole number of 1 or more, got 0"),
        (["--trainer.max_steps", "3"], "error: max_steps=3"),
        (["--trainer.precision", "64-true"], "error: precision=64-true"),
        (
            ["--trainer.callbacks+=ppo_lightning.callbacks.Dashboard"],
            "error: Trainer was configured with `enable_progress",
        ),
        (["--model.env", "probes:Faulty"], "error: cannot import probes"),
    ],
)
def test_bad_input_is_one_sentence_and_a_failure(flags, sentence):
    if flags[-1] == "probes:Faulty":
        flags, sentence = ["--model.env", "no_such_module:Env-v0"], "error: env=no_such_module:Env-v0: cannot import"
    message = fails("fit", *SMALL, *flags)
    assert message.startswith(sentence)
    assert "\n" not in message


FILES = {
    "typo.yaml": "model:\n  env: CartPole-v1\n  num_env: 3\n",
    "section.yaml": "modle:\n  env: CartPole-v1\n",
    "wrong.yaml": "model:\n  env: CartPole-v1\n  num_envs: abc\n",
    "policy.yaml": "model:\n  env: CartPole-v1\n  policy: {class_path: ppo_lightning.ActorCritic, init_args: {hidden: [3]}}\n",
    "list.yaml": "- 1\n- 2\n",
    "empty.yaml": "",
    "broken.yaml": "model: {env: [\n",
    "null.yaml": "model:\n",
    "number.yaml": "model: 3\n",
    "trainer.yaml": "model: {env: CartPole-v1}\ntrainer: 3\n",
    "space.yaml": "model.gamma: [0.9, 0.99]\n",
    "none.py": "import gymnasium\nclass Env(gymnasium.Env):\n    pass\n",
}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("fit --model.num_env 3", "fit has no option --model.num_env: did you mean --model.num_envs?"),
        ("fit --n_envs 3", "fit has no option --n_envs: did you mean --model.num_envs?"),
        ("fit --learning_rate 3", "fit has no option --learning_rate: did you mean --model.optimizer.lr?"),
        ("test --trainer.device 3", "test has no option --trainer.device: did you mean --trainer.devices?"),
        (
            "fit --model.policy.hidden 3",
            "has no key hidden (ppo_lightning.ActorCritic): did you mean model.policy.hidden_s",
        ),
        ("fit --model.num_envs abc", "model.num_envs must be a whole number, got 'abc'"),
        ("fit --model.optimizer.lr abc", "model.optimizer.lr must be a number or"),
        ("fit --trainer.max_epochs abc", "trainer.max_epochs must be a whole number or null, got 'abc'"),
        (
            "fit --model.vectorization asyncc",
            "must be one of sync, async, vector_entry_point, got 'asyncc': did you mean async?",
        ),
        (
            "fit --model.optimizer Adamm",
            "model.optimizer must be the import path of an Optimizer, got 'Adamm': did you mean Adam?",
        ),
        (
            "fit --model.optimizer sgd",
            "model.optimizer must be the import path of an Optimizer, got 'sgd': did you mean SGD?",
        ),
        ("fit --model.policy MlpPolicy", "got 'MlpPolicy': did you mean ActorCritic?"),
        ("fit --model.policy.activation relu", "got 'relu': did you mean torch.nn.ReLU?"),
        ("fit --model.policy.activation torch.nn.relu", "no attribute 'relu'): did you mean torch.nn.ReLU?"),
        ("fit --model.policy.distribution gausian", "got 'gausian': did you mean normal?"),
        ("fit --hepl", "fit has no option --hepl: did you mean --help?"),
        ("fit --model.policy no.module.Net", "model.policy: cannot import no.module.Net (No module named 'no'"),
        ("fit --model.policy ppo_lightning.ActorCriti", "did you mean ppo_lightning.ActorCritic?"),
        ("fit --trainer.callbacks Foo", "trainer.callbacks must be a list of import paths or"),
        (
            "fit --trainer.callbacks EarlyStopping",
            "lightning.pytorch.callbacks.EarlyStopping needs monitor: give --trainer",
        ),
        (
            "fit --trainer.callbacks ModelCheckpoint --trainer.callbacks.save_top_k -5",
            "Invalid value for save_top_k=-5",
        ),
        ("fit --trainer.logger Foo", "trainer.logger must be the import path of a Logger"),
        ("fit --trainer.strategy ddp_typo", "trainer.strategy ddp_typo does not exist: did you mean ddp?"),
        ("fit --trainer.strategy fsdp", "strategy fsdp shards parameters"),
        ("fit --trainer.accelerator tpu", "trainer.accelerator tpu: this machine has none: take cpu or auto"),
        ("fit --trainer.devices 0", "`Trainer(devices='0')` value is not a valid input"),
        ("fit --trainer.devices 1000", "trainer.devices 1000 are more ranks than"),
        ("fit --trainer.num_nodes 2", "trainer.num_nodes 2 waits for other machines"),
        ("fit --trainer.precision half", "trainer.precision must be one of 64, 32"),
        ("fit --trainer.val_check_interval 3", "val_check_interval=3 would count the batches"),
        ("fit --trainer.check_val_every_n_epoch 0", "check_val_every_n_epoch must be 1 or more, got 0"),
        ("fit --trainer.default_root_dir typo.yaml", "trainer.default_root_dir typo.yaml: "),
        ("fit --trainer.default_root_dir /proc/runs", "trainer.default_root_dir /proc/runs cannot be written to"),
        ("fit --seed_everything -1", "seed_everything must lie between 0 and 4294967295, got -1"),
        ("fit --model.env none.Env", "env=Env has no observation_space"),
        ("fit --model.env ALE/Pong-v5", "until ale_py is imported: write ale_py:ALE/Pong-v5"),
        ("fit --model.env ale_py:ALE/Pongg-v5", "did you mean ale_py:ALE/Pong-v5"),
        ("fit --config folder", "config folder is a folder: give a YAML file"),
        ("fit --config=", "config is empty: give a YAML file, or a name of `ppo-lightning configs`"),
        ("fit --config typ.yaml", "there is no config file typ.yaml: did you mean typo.yaml?"),
        ("fit --config typo.yaml", "typo.yaml: there is no key model.num_env: did you mean model.num_envs?"),
        ("fit --config section.yaml", "section.yaml: there is no key modle.env: did you mean model.env?"),
        ("fit --config wrong.yaml", "wrong.yaml: model.num_envs must be a whole number, got 'abc'"),
        ("fit --config policy.yaml", "policy.yaml: model.policy has no key hidden"),
        ("fit --config list.yaml", "config list.yaml holds a list instead of keys and values"),
        ("fit --config empty.yaml", "config empty.yaml holds nothing instead of keys and values"),
        ("fit --config broken.yaml", "config broken.yaml is no plain YAML"),
        ("fit --config null.yaml", "config null.yaml has no value for model"),
        ("fit --config number.yaml", "model must hold keys with values (such as model.env), got 3"),
        ("fit --config trainer.yaml", "trainer must hold keys with values"),
        ("fit --ckpt_path=", "ckpt_path is empty: give a file, last or best, or null"),
        ("fit --config bytes.yaml", "config bytes.yaml is no text in UTF-8"),
        ("fit --config", "--config needs a value"),
        ("validate", "validate needs model.env"),
        ("fitt", "there is no command 'fitt': did you mean fit?"),
        ("--model.env CartPole-v1 fit", "--model.env stands before the command: write the command first"),
        ("report", "report needs RUN"),
        ("report . --ot page.html", "report has no option --ot: did you mean --out?"),
        ("sweep --config typo.yaml", "sweep needs --space"),
        ("sweep --config typo.yaml --spce space.yaml", "sweep has no option --spce: did you mean --space?"),
        ("sweep --config typo.yaml --space space.yaml", "typo.yaml: there is no key model.num_env"),
        ("sweep --config typo.yaml --space bytes.yaml", "bytes.yaml cannot be read as YAML"),
        (
            "sweep --config typo.yaml --space space.yaml --trails 3",
            "sweep has no option --trails: did you mean --trials?",
        ),
        ("sweep --config typo.yaml --space space.yaml --sampler tpee", "got 'tpee': did you mean tpe?"),
        ("sweep --config typo.yaml --space cartpol", "there is no space cartpol: did you mean cartpole?"),
        ("sweep --config typo.yaml --space configs/sweeps/cartpol.yaml", "did you mean cartpole?"),
        (
            "sweep --config typo.yaml --space none/such.yaml",
            "there is no space none/such.yaml: give the path of a YAML",
        ),
        ("sweep --config typo.yaml --space cartpole", "typo.yaml: there is no key model.num_env"),
        ("fit --config configs/cartpole.yaml", "no config file configs/cartpole.yaml: did you mean cartpole?"),
        ("report --hlep", "report has no option --hlep: did you mean --help?"),
        ("report --run x", "report has no option --run: write RUN without an option"),
        ("export --ckpt x", "export has no option --ckpt: write CHECKPOINT without an option"),
        ("enjoy --checkpoint x", "enjoy has no option --checkpoint: write CHECKPOINT without an option"),
        ("push --repo me/x best", "push has no option --repo: write USER/REPO without an option"),
        ("export bset", "there is no checkpoint at bset: did you mean best?"),
        ("enjoy best --episode 3", "enjoy has no option --episode: did you mean --episodes?"),
        ("push me/x best --localfolder x", "push has no option --localfolder: did you mean --local-folder?"),
        ("configs cartpol", "there is no config cartpol: did you mean cartpole?"),
        ("fit --model.clip_coef 0.1", "did you mean --model.clip_range?"),
        ("fit --model.gae_lamda 0.9", "did you mean --model.gae_lambda?"),
        ("fit --model.lam 0.9", "did you mean --model.gae_lambda?"),
        ("fit --model.net_arch [64]", "did you mean --model.policy.init_args.hidden_sizes?"),
        ("fit --model.use_sde true", "did you mean --model.policy.init_args.distribution?"),
        ("fit --model.optimizer.learning_rate 0.1", "(torch.optim.Adam): did you mean model.optimizer.lr?"),
        ("fit --model.optimizer.xyz 0.1", "has no key xyz (torch.optim.Adam): there are lr, betas, eps"),
        ("fit --model.discount 0.9", "fit has no option --model.discount: did you mean --model.gamma?"),
        ("fit --model.horizon 64", "fit has no option --model.horizon: did you mean --model.num_steps?"),
        (
            "fit --config cartpole --model.optimizer.learning_rate 0.1",
            "error: model.optimizer has no key learning_rate",
        ),
        ("fit --seed_everythin 1", "did you mean --seed_everything?"),
        ("fit --trainer.callback+=X", "did you mean --trainer.callbacks?"),
        ("fit --trainer.max_step 3", "did you mean --trainer.max_steps?"),
        ("", "there is no command: give one of fit, validate, test, enjoy, export, push, report, sweep, configs"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr(line, sentence, capsys, monkeypatch, tmp_path):
    from ppo_lightning.__main__ import run

    for name, text in FILES.items():
        Path(name).write_text(text)
    Path("bytes.yaml").write_bytes(b"model:\n  env: \xff\xfe\n")
    Path("folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    if line.endswith(" ALE/Pong-v5"):  # another test may have imported ale_py, which registers its games
        for name in [name for name in gym.registry if name.startswith("ALE/")]:
            monkeypatch.delitem(gym.registry, name)
    words = line.split()
    own = SMALL if words[:1] == ["fit"] and "--config" not in words else []
    with pytest.raises(SystemExit) as caught:
        run([*words[:1], *own, *words[1:]])
    code = caught.value.code
    text = code if isinstance(code, str) else capsys.readouterr().err
    assert code not in (0, None)
    assert text.startswith("error: ")
    assert sentence in text
    assert len(text.splitlines()) == 1
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(
    "flags",
    [["--config", "seed.yaml"], ["--trainer.callbacks", "Timer", "--trainer.callbacks.duration", "00:01:00:00"]],
)
def test_values_that_yaml_or_lightning_leave_open_train(flags):
    Path("seed.yaml").write_text("model: {env: CartPole-v1}\nseed_everything:\n")
    fit(*flags)
    assert Path("lightning_logs/version_0/config.yaml").exists()


def test_an_error_in_a_users_own_callback_keeps_its_traceback(monkeypatch, tmp_path):
    Path("mine.py").write_text(
        "import lightning\nclass Mine(lightning.Callback):\n    def __init__(self):\n        raise ValueError('mine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="mine"):
        main(["fit", *SMALL, "--trainer.callbacks+=mine.Mine"])


def test_the_version_is_printed(capsys):
    from ppo_lightning.__main__ import run

    with pytest.raises(SystemExit) as ended:
        run(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("ppo-lightning 0.")


def test_a_wrong_type_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", *SMALL, "--model.gamma", "high"])
    assert caught.value.code == 2
    assert "gamma" in capsys.readouterr().err


def printed_help(words, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        run(words)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_overview_names_every_command_in_under_40_lines(capsys):
    text = printed_help(["--help"], capsys)
    assert len(text.splitlines()) < 40
    for command in COMMANDS:
        assert f"\n  {command} " in text
    assert text.count("\n  ppo-lightning ") >= 3


def test_help_of_fit_has_every_parameter_of_the_model_in_one_line_in_their_order(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed_help(["fit", "--help"], capsys).splitlines()
    assert len(lines) < 120
    assert max(map(len, lines)) <= 104
    own = [line.split()[0].removeprefix("--model.") for line in lines if line.startswith("  --model.")]
    assert own == list(inspect.signature(PPO).parameters)
    (gamma,) = [line for line in lines if "--model.gamma " in line]
    assert gamma.split(maxsplit=1)[1] == "discount factor (per environment step, 0 to 1) [0.99]"
    assert not [line for line in lines if "…" in line]


def test_help_of_a_part_has_type_default_unit_and_meaning(capsys):
    text = " ".join(printed_help(["fit", "--help.model"], capsys).split())
    assert "--model.gamma (a number; default: 0.99) discount factor (per environment step, 0 to 1)." in text
    assert "longest step or reset of async environments; a longer one is an error (seconds)" in text
    text = printed_help(["fit", "--help.policy"], capsys)
    assert "--model.policy.init_args.log_std_init  (a number; default: 0.0)" in text
    assert "observation_space" not in text.split("\n", 1)[0]
    assert "--trainer.accumulate_grad_batches" in printed_help(["fit", "--help.trainer"], capsys)


def test_print_config_prints_what_is_not_complete(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--model.gamma", "0.9", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["gamma"] == 0.9


def test_print_config_can_be_fed_back(capsys):
    with pytest.raises(SystemExit):
        main(["fit", *SMALL, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["optimizer"]["init_args"]["eps"] == 1e-5
    assert config["model"]["policy"]["class_path"] == "ppo_lightning.ActorCritic"
    assert config["trainer"]["max_epochs"] == -1


def test_one_field_of_the_optimiser_keeps_the_others(capsys):
    with pytest.raises(SystemExit):
        main(["fit", *SMALL, "--model.optimizer.lr", "0.01", "--print_config"])
    optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["eps"], optimizer["fused"]) == (0.01, 1e-5, True)


def test_environments_wrappers_networks_and_schedulers_by_class_path():
    Path("all.yaml").write_text(
        """
model:
  env:
    class_path: gymnasium.envs.classic_control.pendulum.PendulumEnv
  wrappers:
    - class_path: gymnasium.wrappers.TimeLimit
      init_args: {max_episode_steps: 20}
    - class_path: gymnasium.wrappers.TimeAwareObservation
      init_args: {normalize_time: true}
  num_envs: 2
  num_steps: 32
  total_steps: 128
  policy:
    class_path: ppo_lightning.ActorCritic
    init_args: {hidden_sizes: [8, 8], activation: torch.nn.ReLU, log_std_init: -1.0}
  clip_range: {start: 0.3, end: 0.1}
  lr_scheduler:
    class_path: torch.optim.lr_scheduler.StepLR
    init_args: {step_size: 1}
"""
    )
    main(["fit", "--config", "all.yaml", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"])
    rows = table()
    rows = rows[~np.isnan(rows["train/learning_rate"])]
    assert rows["train/learning_rate"].tolist() == pytest.approx([3e-4, 3e-5])
    assert rows["train/clip_range"].tolist() == pytest.approx([0.3, 0.2])
    assert rows["rollout/ep_len_mean"].tolist() == [20, 20]
    # and the checkpoint brings all of it back, by the command line and by Python
    main(["validate", "--ckpt_path", str(RUN / "checkpoints/best.ckpt"), "--trainer.accelerator", "cpu"])
    from ppo_lightning import PPO

    model = PPO.load_from_checkpoint(RUN / "checkpoints/best.ckpt")
    assert model.policy.network.actor_trunk.layers[0].out_features == 8
    assert model.predict(np.zeros(4)).shape == (1,)


def test_rows_are_on_disk_before_the_end():
    """A run that is killed has lost 20 rows at most."""
    from ppo_lightning.cli import RunCSVLogger

    logger = RunCSVLogger(".", "lightning_logs", 0)
    for step in range(20):
        logger.log_metrics({"a": 1.0}, step=1024 * step)
    assert len((RUN / "metrics.csv").read_text().splitlines()) == 21


def test_an_interrupt_ends_the_run_with_a_checkpoint_and_no_process_left(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ppo_lightning",
        "fit",
        *SMALL,
        "--model.total_steps",
        "100000000",
        "--name=version",
    ]
    command += ["--model.vectorization", "async", "--model.num_envs", "2", "--trainer.limit_val_batches", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        table = tmp_path / RUN / "metrics.csv"
        for _ in range(600):
            if table.exists():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0, output
    assert torch.load(tmp_path / RUN / "checkpoints/last.ckpt")["state_dict"]["env_steps"] > 0
    deadline, left = time.monotonic() + 10, "?"
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = subprocess.run(["ps", "-o", "args=", "-g", str(process.pid)], capture_output=True, text=True).stdout
    assert not left


def test_threads_are_as_many_as_pay():
    from ppo_lightning import PPO, ActorCritic
    from ppo_lightning.cli import num_threads_for

    cores = len(os.sched_getaffinity(0))
    small, large = PPO("CartPole-v1"), PPO("CartPole-v1", num_envs=64)
    wide = PPO("CartPole-v1", policy=lambda *spaces: ActorCritic(*spaces, hidden_sizes=(256, 256)))
    assert num_threads_for(small, processes=1) == 1
    assert num_threads_for(large, processes=1) == num_threads_for(wide, processes=1) == cores
    assert num_threads_for(large, processes=2 * cores) == 1


def test_a_logger_that_cannot_write_gives_up_and_training_continues(monkeypatch):
    from lightning.pytorch.loggers import TensorBoardLogger

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", full)
    with pytest.warns(
        UserWarning, match="RunTensorBoardLogger stops logging, since it cannot write.*training continues"
    ) as said:
        fit()
    assert sum("RunTensorBoardLogger" in str(one.message) for one in said) == 1
    assert table()["step"].max() == 512


# --- where values come from --------------------------------------------------------------------------------------------

QUIET = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary=false",
]


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def of_last(run: Path = RUN) -> tuple[int, float]:
    """Environment steps and gamma of a run's last checkpoint."""
    last = torch.load(run / "checkpoints/last.ckpt")
    return int(last["state_dict"]["env_steps"]), last["hyper_parameters"]["gamma"]


LAST = str(RUN / "checkpoints/last.ckpt")
WAYS = {
    "the first of two config files": lambda path: ["fit", "-c", write("a.yaml", path), "--config=b.yaml"],
    "the second of two config files": lambda path: ["fit", "-c=b.yaml", "--config", write("a.yaml", path)],
    "a config file of all subcommands": lambda path: [
        "--config", write("all.yaml", "fit:\n  " + path.replace("\n", "\n  ")), "fit", "--config", "b.yaml"
    ],
    "a config file, with a path in another that is switched off": lambda path: [
        "fit", "--config", write("z.yaml", "ckpt_path: nowhere.ckpt"), "-c", write("a.yaml", path), "-cb.yaml"
    ],
    "a flag": lambda path: ["fit", "--config", "b.yaml", f"--ckpt_path={path.split()[1]}"],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_may_be_named_wherever_a_value_may_stand(way):
    fit("--model.gamma", "0.9")
    write("b.yaml", "model: {total_steps: 640}")
    main([*WAYS[way]("ckpt_path: last\n"), *QUIET])
    assert of_last() == (640, 0.9)
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]


def cli(args: object, **parser_kwargs: object) -> None:
    from ppo_lightning import PPO
    from ppo_lightning.cli import CLI_OPTIONS, PPOCLI

    PPOCLI(PPO, **{**CLI_OPTIONS, "parser_kwargs": {**CLI_OPTIONS["parser_kwargs"], **parser_kwargs}}, args=args)


QUIETLY = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def test_python_may_give_keys_and_values_in_the_place_of_words():
    fit("--model.gamma", "0.9")
    cli({"subcommand": "fit", "fit": {"ckpt_path": "last", "model": {"total_steps": 640}, "trainer": QUIETLY}})
    assert of_last() == (640, 0.9)


def test_environment_variables_and_default_config_files_may_name_a_checkpoint(monkeypatch):
    fit("--model.gamma", "0.9")
    monkeypatch.setenv("PL_FIT__CKPT_PATH", "last")
    monkeypatch.setenv("PL_FIT__MODEL__TOTAL_STEPS", "640")
    cli(["fit", *QUIET], default_env=True)
    assert of_last() == (640, 0.9)
    write("defaults.yaml", "ckpt_path: last\nmodel: {total_steps: 768}\n")
    cli(["fit", *QUIET], fit={"default_config_files": ["defaults.yaml"]})
    assert of_last() == (768, 0.9)


def test_null_switches_a_checkpoint_of_a_config_off():
    fit("--model.gamma", "0.9")
    config = write("a.yaml", "ckpt_path: last\nmodel: {env: CartPole-v1}")
    fit("--config", config, "--ckpt_path", "null")
    assert of_last(Path("lightning_logs/version_1")) == (512, 0.99)
    fit("--config", config, "-c", write("off.yaml", "ckpt_path: null"))
    assert of_last(Path("lightning_logs/version_2")) == (512, 0.99)


def test_values_may_belong_to_the_class_that_the_checkpoint_names():
    fit("--model.optimizer", "SGD", "--model.optimizer.lr", "0.01")
    main(["fit", "--ckpt_path", "last", "--model.optimizer.momentum", "0.5", "--model.total_steps", "640", *QUIET])
    optimizer = torch.load(LAST)["hyper_parameters"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.SGD"
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["momentum"]) == (0.01, 0.5)


def test_best_is_the_best_checkpoint_of_the_newest_run(capsys):
    fit("--model.gamma", "0.9", "--trainer.default_root_dir", "runs")
    fit("--trainer.default_root_dir", "runs", "--trainer.limit_val_batches", "0")
    capsys.readouterr()
    for command in ("validate", "test"):
        main([command, "--ckpt_path", "best", "--trainer.default_root_dir", "runs", "--trainer.accelerator", "cpu"])
        assert "eval/mean_reward" in capsys.readouterr().out
    assert "there is no best.ckpt below" in fails("validate", "--ckpt_path=best", "--trainer.default_root_dir=empty")


def test_the_config_of_a_resumed_run_repeats_it_from_its_start(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED")
    fit("--model.gamma", "0.9")
    monkeypatch.delenv("PL_GLOBAL_SEED")
    main(["fit", "--ckpt_path", "last", "--model.total_steps", "640", *QUIET])
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["ckpt_path"] is None
    assert (config["model"]["gamma"], config["model"]["total_steps"]) == (0.9, 640)
    assert config["seed_everything"] == torch.load(LAST)["ppo_lightning"]["seed"]
    before = contents(RUN)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    main(["fit", "--config", str(RUN / "config.yaml")])
    assert contents(RUN) == before
    assert of_last(Path("lightning_logs/version_1")) == (640, 0.9)


def contents(folder: Path | str = ".") -> dict[Path, bytes]:
    """All files below a folder, and all folders."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in Path(folder).rglob("*")}


def test_random_command_lines_succeed_or_end_in_one_sentence():
    from random_command_lines import faults

    assert [fault for fault in faults(seed=11, count=15) if fault is not None] == []


# --- names of runs -----------------------------------------------------------------------------------------------------


def test_a_run_is_called_by_its_task_and_seed(tmp_path):
    words = [*SMALL, "--model.total_steps", "128", "--seed_everything", "7", "--trainer.limit_val_batches", "0"]
    for _ in range(2):  # in a process of its own: here a fixture names runs
        subprocess.run([sys.executable, "-m", "ppo_lightning", "fit", *words], check=True, capture_output=True)
    names = sorted(path.name for path in Path("lightning_logs").iterdir())
    assert names == ["cartpole-v1_s7_0", "cartpole-v1_s7_1"]


def test_a_name_is_chosen_and_numbered_and_a_resumed_run_keeps_its_own(monkeypatch):
    for _ in range(2):
        fit("--name", "lr.high")
    assert sorted(path.name for path in Path("lightning_logs").iterdir()) == ["lr.high_0", "lr.high_1"]
    fit("--name", "other", "--ckpt_path", "last", "--model.total_steps", "640")
    assert sorted(path.name for path in Path("lightning_logs").iterdir()) == ["lr.high_0", "lr.high_1"]
    assert yaml.safe_load(Path("lightning_logs/lr.high_0/config.yaml").read_text())["name"] == "lr.high"


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b"])
def test_a_name_that_is_none_is_refused(name, capsys):
    with pytest.raises(SystemExit) as ended:
        fit("--name", name)
    assert "name must be letters, digits, dots and dashes, got" in str(ended.value.code)
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("CartPole-v1", "cartpole-v1_s3"),
        ("ppo_lightning.envs.small.Recall", "recall_s3"),
        ("minigrid:MiniGrid-Empty-5x5-v0", "minigrid-empty-5x5-v0_s3"),
        ("ALE/Pong-v5", "ale-pong-v5_s3"),
    ],
)
def test_names_of_tasks_are_names_of_folders(env, expected):
    from types import SimpleNamespace

    from conftest import RUN_NAME

    from ppo_lightning.envs import EnvFactory, resolve

    factory = EnvFactory(resolve(env), {}, (), "sync", restarts=False)
    cli = SimpleNamespace(model=SimpleNamespace(env_factory=factory), config={"seed_everything": 3}, _get=dict.get)
    assert RUN_NAME(cli) == expected


class Linked(PPOCLI):
    """A command line with an option of its own that sets one of the model."""

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--steps", type=int, default=16)
        parser.link_arguments("steps", "model.num_steps")


class OwnTrainer(lightning.Trainer):
    """A Trainer with an argument of its own."""

    def __init__(self, *args, mine: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.mine = mine


def test_options_that_are_linked_resume():
    options = [word for word in SMALL if word not in ("--model.num_steps", "32")]
    Linked(PPO, **CLI_OPTIONS, args=["fit", *options, "--model.total_steps", "64", "--steps", "8", "--name", "linked"])
    again = Linked(
        PPO, **CLI_OPTIONS, args=["fit", "--ckpt_path", "last", "--model.total_steps", "128", "--steps", "8"]
    )
    assert (again.model.num_steps, again.model.num_env_steps) == (8, 128)


def test_a_trainer_of_ones_own_has_its_arguments():
    words = ["fit", *SMALL, "--model.total_steps", "128", "--trainer.mine", "4"]
    assert PPOCLI(PPO, trainer_class=OwnTrainer, **CLI_OPTIONS, args=words).trainer.mine == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"run": False, "args": []}, "PPOCLI does not support run=False: make PPO and Trainer in Python"),
        (
            {"subclass_mode_model": True, "args": ["fit"]},
            r"does not support subclass_mode_model=True: .*PPOCLI\(MyPPO\)",
        ),
        ({"args": {"subcommand": "fit", "model": {}}}, "names the subcommand fit and has no settings under that name"),
    ],
)
def test_what_the_class_does_not_support_is_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        PPOCLI(PPO, **CLI_OPTIONS, **options)


def test_a_script_that_makes_the_class_ends_in_one_sentence_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--model.gama", "0.9"])
    with pytest.raises(SystemExit, match="2"):
        PPOCLI(PPO, **CLI_OPTIONS)
    assert capsys.readouterr().err == "error: fit has no option --model.gama: did you mean --model.gamma?\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model.env_kwargs.top 5", {"cfg": {"a": 1, "b": 2}, "top": 5}),
        ("--model.env_kwargs.cfg.a 9", {"cfg": {"a": 9, "b": 2}, "top": 3}),
        ("--model.env_kwargs.cfg.b.c=[1,2] --model.env_kwargs.cfg.a x", {"cfg": {"a": "x", "b": {"c": [1, 2]}}, "top": 3}),
        ("--model.env_kwargs.cfg.a 2020-01-01 --model.env_kwargs.cfg.b={", {"cfg": {"a": "2020-01-01", "b": "{"}, "top": 3}),
        ("--model.env_kwargs.cfg.a 5 --model.env_kwargs.cfg {\"b\":7}", {"cfg": {"b": 7}, "top": 3}),
        ("--model.env_kwargs.n.a 1 --model.env_kwargs.n.b 2", {"cfg": {"a": 1, "b": 2}, "top": 3, "n": {"a": 1, "b": 2}}),
    ],
)  # fmt: skip
def test_a_part_of_an_argument_of_environments_keeps_the_other_parts(flags, expected, capsys):
    Path("nested.yaml").write_text("model: {env: CartPole-v1, env_kwargs: {cfg: {a: 1, b: 2}, top: 3}}\n")
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "nested.yaml", *flags.split(), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["env_kwargs"] == expected
    assert "needs a value" in fails_with_usage(
        "fit", "--config", "nested.yaml", "--model.env_kwargs.cfg.a", capsys=capsys
    )


def fails_with_usage(*words: str, capsys) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(list(words))
    return capsys.readouterr().err
