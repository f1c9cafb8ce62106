"""More of the zoo: training steps of one's own, and modules of the backends in Keras's models.

Importing it adds them to `zoo.ZOO`.
"""
# ruff: noqa: ARG001, ARG002  what Keras calls has Keras's signatures

from __future__ import annotations

import importlib.util

import keras
from keras import layers, ops, optimizers
from zoo import BACKEND, BATCH, Specimen, X, compiled, kind, sequential


class Variational(keras.Model):
    """An encoder and a decoder, with metrics that are attributes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = (
            sequential(layers.Dense(4)),
            sequential(layers.Dense(4), shape=(2,)),
        )
        self.seeds = keras.random.SeedGenerator(3)
        self.divergence = keras.metrics.Mean(name="divergence")
        self.errors = {"mean": keras.metrics.Mean(name="error"), "more": [keras.metrics.Sum()]}

    def call(self, x, training=False):
        mean, log_variance = ops.split(self.encoder(x), 2, axis=-1)
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
        self.add_loss(0.1 * ops.mean(mean**2 + ops.exp(log_variance) - log_variance))
        return self.decoder(mean + ops.exp(0.5 * log_variance) * noise)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        error = ops.mean((x - y_pred) ** 2)
        self.divergence.update_state(self.losses[0])
        self.errors["mean"].update_state(error)
        self.errors["more"][0].update_state(error)
        return error + sum(self.losses)


@kind("VAE")
def _():
    model = Variational()
    model(X[:BATCH])
    return compiled(model, loss=None)


class Adversarial(keras.Model):
    """A generator and a discriminator, each with its optimizer, trained in turn.

    In a step of its own that is not compiled, as only that works alike on all backends: JAX passes
    on no variables of a second optimizer.
    """

    def __init__(self, contained):
        super().__init__()
        self.generator = sequential(layers.Dense(4, "tanh"), layers.Dropout(0.2), layers.Dense(4))
        self.discriminator = sequential(layers.Dense(3, "tanh"), layers.Dense(1))
        first, second = optimizers.Adam(0.01), optimizers.RMSprop(0.01, momentum=0.5)
        if contained:
            self.pair = {"generator": first, "others": [second]}
        else:
            self.g_optimizer, self.d_optimizer = first, second
        self.contained = contained
        self.g_loss = keras.metrics.Mean(name="g_loss")
        self.drawn = keras.random.SeedGenerator(6)
        self.built = True
        for optimizer, part in self.parts():
            optimizer.build(part.trainable_variables)

    def parts(self):
        first = self.pair["generator"] if self.contained else self.g_optimizer
        second = self.pair["others"][0] if self.contained else self.d_optimizer
        return (first, self.generator), (second, self.discriminator)

    @property
    def metrics(self):
        return [self.g_loss]

    def call(self, x):
        return self.generator(x)

    def losses_of(self, x):
        noise = keras.random.normal((BATCH, 4), seed=self.drawn)
        fake = self.generator(noise, training=True)
        judged = self.discriminator(fake)
        return ops.mean((judged - 1) ** 2), ops.mean(judged**2 + (self.discriminator(x) - 1) ** 2)

    def train_step(self, *arguments):
        return {
            "jax": self.train_step_jax,
            "tensorflow": self.train_step_tensorflow,
            "torch": self.train_step_torch,
        }[BACKEND](*arguments)

    def train_step_tensorflow(self, data):
        import tensorflow as tf

        for which, (optimizer, part) in enumerate(self.parts()):
            variables = part.trainable_variables
            with tf.GradientTape() as tape:
                loss = self.losses_of(data[0])[which]
            optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        self.g_loss.update_state(loss)
        return {"loss": self.g_loss.result()}

    def train_step_torch(self, data):
        import torch

        for which, (optimizer, part) in enumerate(self.parts()):
            self.zero_grad()
            loss = self.losses_of(data[0])[which]
            loss.backward()
            gradients = [v.value.grad for v in part.trainable_variables]
            with torch.no_grad():
                optimizer.apply(gradients, part.trainable_variables)
        self.g_loss.update_state(loss.detach())
        return {"loss": self.g_loss.result()}

    def train_step_jax(self, state, data):
        import jax

        trainable, others, own, metrics = state
        at_of = {id(v): i for i, v in enumerate(self.trainable_variables)}
        trainable = list(trainable)
        for which, (optimizer, part) in enumerate(self.parts()):
            mine = [at_of[id(v)] for v in part.trainable_variables]

            def loss_of(values, which=which, mine=mine, others=others):
                everything = list(trainable)
                for at, value in zip(mine, values, strict=True):
                    everything[at] = value
                pairs = [
                    *zip(self.trainable_variables, everything, strict=True),
                    *zip(self.non_trainable_variables, others, strict=True),
                ]
                with keras.StatelessScope(state_mapping=pairs) as scope:
                    loss = self.losses_of(data[0])[which]
                return loss, [
                    value if (new := scope.get_current_value(v)) is None else new
                    for v, value in zip(self.non_trainable_variables, others, strict=True)
                ]

            values = [trainable[at] for at in mine]
            (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(values)
            slots = [v.value for v in optimizer.variables]
            values, slots = optimizer.stateless_apply(slots, gradients, values)
            for at, value in zip(mine, values, strict=True):
                trainable[at] = value
            for variable, value in zip(optimizer.variables, slots, strict=True):
                variable.assign(value)
        metrics = self.g_loss.stateless_update_state(metrics, loss)
        return {"loss": self.g_loss.stateless_result(metrics)}, (trainable, others, own, metrics)


def adversarial(*, contained):
    model = Adversarial(contained)
    model.compile(run_eagerly=True)
    return Specimen(model)


@kind("GAN")
def _():
    return adversarial(contained=False)


@kind("GAN, its optimizers in a dict and a list")
def _():
    return adversarial(contained=True)


@kind("a model that holds a compiled one")
def _():
    inner = sequential(layers.Dense(4, "tanh"), layers.Dropout(0.2), layers.Dense(4))
    inner.compile("rmsprop", "mse", metrics=["mae"])
    inner.fit(X, X, epochs=1, verbose=0)
    return compiled(sequential(inner, layers.Dense(1)))


# What wraps modules of a backend.


@kind("a torch module with buffers", backends=["torch"])
def _():
    import torch

    module = torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.2)
    )
    inputs = keras.Input((4,))
    x = layers.TorchModuleWrapper(module, output_shape=(None, 3))(inputs)
    return compiled(keras.Model(inputs, layers.Dense(1)(x)))


@kind("a torch module as an attribute", backends=["torch"])
def _():
    import torch

    class Holder(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.dense = torch.nn.BatchNorm1d(4), layers.Dense(1)

        def call(self, x):
            return self.dense(self.norm(x))

    model = Holder()
    model(X[:BATCH])
    return compiled(model)


@kind("a function of JAX", backends=["jax"])
def _():
    import jax

    def make(rng, inputs, training):
        return {"w": jax.random.normal(rng, (inputs.shape[-1], 3))}, {"seen": jax.numpy.zeros(())}

    def call(params, state, inputs, training):
        return inputs @ params["w"], {"seen": state["seen"] + training}

    layer = layers.JaxLayer(call_fn=call, init_fn=make)
    return compiled(sequential(layer, layers.Dense(1)))


if importlib.util.find_spec("flax"):

    @kind("a module of Flax", backends=["jax"])
    def _():
        import flax.linen as nn

        class Module(nn.Module):
            @nn.compact
            def __call__(self, x, *, training=False):
                x = nn.BatchNorm(use_running_average=not training)(nn.Dense(3)(x))
                return nn.Dropout(0.2, deterministic=not training)(x)

        return compiled(sequential(layers.FlaxLayer(Module()), layers.Dense(1)))
