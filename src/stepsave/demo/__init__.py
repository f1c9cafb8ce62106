"""Shows on real data that a training killed in the middle of a write goes on.

`python -m stepsave.demo` trains a small convolutional classifier on scikit-learn's
handwritten digits four times, each time in a process of its own:

1. without interruption, for comparison;
2. with a backup every five batches, until SIGKILL ends the process in the middle of an epoch
   while a write is in flight;
3. the same command again, which goes on at the batch after the last committed backup;
4. with `stepsave.BackupAndRestore` and Keras's own callback in turn, to see how long each
   makes training wait.

It prints what happened as a table, and ends with status 0 only if the third process trained no
batch twice and left none out, and the model and optimizer that it ended with equal those of the
first bit for bit. `KERAS_BACKEND` chooses the backend, JAX by default.
"""
