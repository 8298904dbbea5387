"""In a notebook: the stop button pauses training, and running the cell again goes on."""

import time
from pathlib import Path

from jupyter_client.manager import start_new_kernel

SETUP = """
import lightning
import logging
from ppo_lightning import PPO

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Marks(lightning.Callback):
    def on_train_batch_end(self, *_):
        open("there", "w").close()


def trainer():
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Marks()],
        limit_val_batches=0,
    )


model = PPO("CartPole-v1", num_envs=2, num_steps=16, num_minibatches=2, total_steps=10**9, compile=False)
"""


def run(client, code):
    """Run a cell to its end; what it says at the end."""
    reply = client.execute(code, reply=True, timeout=60, user_expressions={"said": "said"} if "said =" in code else {})
    content = reply["content"]
    assert content["status"] == "ok", content
    expressions = content["user_expressions"]
    return eval(expressions["said"]["data"]["text/plain"]) if expressions else None


def test_the_stop_button_pauses_and_the_cell_run_again_resumes():
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        run(client, SETUP)
        identity = client.execute("trainer().fit(model)")
        for _ in range(600):
            if Path("there").exists():
                break
            time.sleep(0.1)
        time.sleep(0.5)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=30)
        assert reply["parent_header"]["msg_id"] == identity
        assert reply["content"]["status"] == "ok", reply["content"]
        steps, name = run(client, "said = model.num_env_steps, model.agreed_stop_signal.name")
        assert steps > 0
        assert steps % 32 == 0
        assert name == "SIGINT"
        again = "model.total_steps = model.num_env_steps + 64\ntrainer().fit(model)\n"
        said = run(
            client,
            again + "said = model.num_env_steps, model.agreed_stop_signal, len(model.rollouts.episodes.ep_info_buffer)",
        )
        assert said[:2] == (steps + 64, None)
        assert said[2] > 0
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
