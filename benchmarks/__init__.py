"""The benchmark: normlab beside Keras on TensorFlow, plain PyTorch and ONNX Runtime.

    make bench            # all of it, into docs/
    make bench QUICK=1    # fewer rounds, in under five minutes

A *group* is measured in one go by several *entries*, each in a process of its own; an entry's
process holds a *entry*, which a module of `benchmarks.peers` builds. `docs/benchmarks.md` says
what is measured and how.
"""
