"""More of the zoo: optimizers, precisions, layers that are quantized or adapted.

Importing it adds them to `zoo.ZOO`.
"""

from __future__ import annotations

import keras
from keras import layers, ops, optimizers
from zoo import (
    ALL,
    IMAGES,
    TOKENS,
    X,
    compiled,
    kind,
    sequential,
)

# Optimizers.

OPTIMIZERS = {
    "SGD": lambda: optimizers.SGD(0.01, momentum=0.9, nesterov=True),
    "RMSprop": lambda: optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "Adam amsgrad": lambda: optimizers.Adam(0.01, amsgrad=True, clipnorm=1.0),
    "Adadelta": lambda: optimizers.Adadelta(0.1),
    "Adagrad": lambda: optimizers.Adagrad(0.1),
    "Adamax": lambda: optimizers.Adamax(0.1),
    "Nadam": lambda: optimizers.Nadam(0.01),
    "Ftrl": lambda: optimizers.Ftrl(0.1),
    "Lion": lambda: optimizers.Lion(0.01),
    "Adafactor": lambda: optimizers.Adafactor(0.01),
    "Lamb": lambda: optimizers.Lamb(0.01),
    "Muon": lambda: optimizers.Muon(0.01),
    "ScheduleFreeAdamW": lambda: optimizers.ScheduleFreeAdamW(0.01, warmup_steps=3),
    "a schedule": lambda: optimizers.Adam(optimizers.schedules.CosineDecay(0.1, 9, warmup_steps=3)),
    "an average": lambda: optimizers.Adam(0.01, use_ema=True, ema_momentum=0.8),
    "an average put in place": lambda: optimizers.AdamW(
        0.01, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3
    ),
    # Both places of the interruption, steps 4 and 6: between two updates, and after one.
    "accumulated gradients": lambda: optimizers.Adam(0.01, gradient_accumulation_steps=3),
    "accumulated gradients and an average": lambda: optimizers.Lion(
        0.01, gradient_accumulation_steps=3, use_ema=True
    ),
    "a scaled loss": lambda: optimizers.LossScaleOptimizer(
        optimizers.Adam(0.01), initial_scale=64.0, dynamic_growth_steps=3
    ),
}
if not hasattr(optimizers, "ScheduleFreeAdamW"):
    del OPTIMIZERS["ScheduleFreeAdamW"]


def optimized(optimizer):
    model = sequential(layers.Dense(6, "tanh"), layers.Dense(5), layers.Dense(1))
    return compiled(model, optimizer)


for name, make_optimizer in OPTIMIZERS.items():
    kind(f"optimizer: {name}")(lambda make_one=make_optimizer: optimized(make_one()))

if hasattr(optimizers, "MultiOptimizer"):

    @kind("optimizer: one for each part")
    def _():
        model = sequential(layers.Dense(6, "tanh", name="a"), layers.Dense(1, name="b"))
        first, second = optimizers.Adam(0.01), optimizers.SGD(0.01, momentum=0.9)
        return compiled(
            model, optimizers.MultiOptimizer(lambda v: first if "a/" in v.path else second)
        )


# Precisions.

POLICIES = ["mixed_float16", "mixed_bfloat16", "bfloat16", "float64"]


def with_policy(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        inner = [layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.2), layers.Dense(1)]
        return compiled(sequential(*inner))
    finally:
        keras.config.set_dtype_policy(before)


for policy in POLICIES:
    # JAX has no float64 unless it is configured otherwise.
    where = ["tensorflow", "torch"] if policy == "float64" else ALL
    kind(f"precision {policy}", backends=where)(lambda name=policy: with_policy(name))


# Layers that are changed once they are built.


def transformer_parts():
    tokens = keras.Input((4,), dtype="int32")
    embedding, dense = layers.Embedding(9, 4), layers.Dense(4)
    einsum = layers.EinsumDense("abc,cd->abd", (4, 4), bias_axes="d")
    x = einsum(dense(embedding(tokens)))
    model = keras.Model(tokens, layers.Dense(1)(layers.Flatten()(x)))
    return model, (embedding, dense, einsum)


@kind("LoRA")
def _():
    model, parts = transformer_parts()
    for part in parts:
        part.enable_lora(2)
    return compiled(model, x=TOKENS)


for mode in ("int8", "int4", "float8"):

    @kind(f"quantized to {mode}")
    def _(mode=mode):
        model, (_, dense, einsum) = transformer_parts()
        for part in (dense, einsum):
            part.quantize(mode)
        return compiled(model, x=TOKENS)


@kind("quantized, with LoRA")
def _():
    model, parts = transformer_parts()
    for part in parts:
        part.quantize("int8")
        part.enable_lora(2)
    return compiled(model, x=TOKENS)


# Layers that are adapted to data, and those that change it.


@kind("Normalization")
def _(again):
    layer = layers.Normalization()
    layer.adapt(X if again else 3 * X + 1)
    return compiled(sequential(layer, layers.Dense(1)))


@kind("Normalization, not adapted again")
def _(again):
    layer = layers.Normalization()
    if not again:
        layer.adapt(3 * X + 1)
    return compiled(sequential(layer, layers.Dense(1)))


@kind("Discretization")
def _():
    layer = layers.Discretization(num_bins=3, output_mode="one_hot")
    layer.adapt(X)  # its bins are of the configuration, so are those of the script
    inputs = keras.Input((4,))
    x = layers.Flatten()(layer(inputs))
    encoded = layers.CategoryEncoding(3, "multi_hot")(ops.cast(x[:, :2], "int32"))
    x = layers.Concatenate()([x, encoded])
    return compiled(keras.Model(inputs, layers.Dense(1)(x)))


def worded(layer, words):
    inputs = keras.Input((1,), dtype="string")
    x = ops.cast(layers.Flatten()(layer(inputs)), "float32")
    return compiled(keras.Model(inputs, layers.Dense(1)(x)), x=words)


def words():
    import tensorflow as tf

    return tf.constant([["a b"], ["b c"], ["c"], ["a a"], ["b"], ["b a"], ["a"], ["c c"]])


@kind("StringLookup", backends=["tensorflow"])
def _():
    return worded(layers.StringLookup(vocabulary=["a", "b", "c"], output_mode="one_hot"), words())


@kind("TextVectorization", backends=["tensorflow"])
def _():
    layer = layers.TextVectorization(output_mode="tf_idf")
    layer.adapt(words())
    return worded(layer, words())


@kind("images at random")
def _():
    model = sequential(
        layers.RandomFlip(),
        layers.RandomRotation(0.1, seed=3),
        layers.RandomContrast(0.2),
        layers.RandomBrightness(0.2, value_range=(0, 1)),
        layers.RandomZoom(0.1),
        layers.RandomTranslation(0.1, 0.1),
        layers.Flatten(),
        layers.Dense(1),
        shape=(6, 6, 3),
    )
    return compiled(model, x=IMAGES)
