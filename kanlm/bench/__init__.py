"""Speed and memory of KAN and MLP side by side: `kanlm bench layer|train|eval|decode`.

    measure.py   arms, alternating rounds, peak memory, the machine's floor, table and dated JSON
    layer.py     one full-edge layer against its MLP and the peers on the package registry
    train.py     whole training steps of models with equally many parameters
    reading.py   scoring a text and reading a prompt, against the forward pass of training
    decode.py    cached decoding of the same models

Every arm runs once in each round, so that a busy machine slows all of them; an arm's ratio is the median over
rounds of (baseline seconds / its seconds). An arm whose results do not match the reference is not timed.
"""
