"""The algorithm: advantages, loss, minibatches, gradient steps."""
