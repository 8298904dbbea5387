"""Rejax's PPO: JAX, environments of gymnax, rollouts and updates in one compiled function."""

import os
from typing import Any

from common import GAE_LAMBDA, GAMMA, HIDDEN, MAX_GRAD_NORM, VF_COEF, run_from_arguments


def main() -> None:
    run = run_from_arguments("rejax")
    size = run.size
    if run.name not in {"w1t", "w2", "w3", "w3c"}:
        run.unsupported("Its environments are those of gymnax and the like, compiled together with the training.")
        return
    if hasattr(os, "sched_setaffinity"):  # XLA's thread pools have as many threads as the process may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: run.threads])
    import jax
    from rejax import PPO

    jax.config.update("jax_platforms", "cpu")
    algorithm = PPO.create(
        env=size.env,
        agent_kwargs={"activation": "tanh", "hidden_layer_sizes": HIDDEN},
        num_envs=size.num_envs,
        num_steps=size.num_steps,
        num_epochs=size.epochs,
        num_minibatches=size.minibatches,
        learning_rate=size.lr,
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        clip_eps=size.clip,
        vf_coef=VF_COEF,
        ent_coef=size.ent_coef,
        max_grad_norm=MAX_GRAD_NORM,
        skip_initial_evaluation=True,
    )

    def train(iterations: int) -> Any:
        """Its ``train``, with no evaluation."""
        length = iterations * size.rollout
        plain = algorithm.replace(total_timesteps=length, eval_freq=length, eval_callback=lambda *_: ())
        return jax.jit(lambda state: plain.train(train_state=state)[0])

    state = jax.jit(algorithm.init_state)(jax.random.PRNGKey(0))
    run.begin()
    timed = train(run.iterations).lower(state).compile()
    state = jax.block_until_ready(train(run.warm_up)(state) if run.warm_up else state)
    run.warm()
    jax.block_until_ready(timed(state))
    run.end()
    run.report("rejax", "jax", "jaxlib", "gymnax", "flax", "optax")


if __name__ == "__main__":
    main()
