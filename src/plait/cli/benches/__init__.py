"""What `plait bench` can measure: one file each, imported only when asked for."""

# name -> (module, summary); each module has `measure(inputs: Inputs) -> Report`
BENCHES: dict[str, tuple[str, str]] = {
    "ops": ("plait.cli.benches.ops", "every operation: its fast path against its reference and its floor"),
    "train": ("plait.cli.benches.train", "a training step: forward, backward, AdamW"),
    "prefill": ("plait.cli.benches.prefill", "reading a prompt"),
    "decode": ("plait.cli.benches.decode", "writing, a token per sequence and step"),
    "twin": ("plait.cli.benches.twin", "decoding at growing contexts: the hybrid against a Transformer of its size"),
    "latency": ("plait.cli.benches.latency", "times predicted from measured blocks, against random architectures"),
    "serve": ("plait.cli.benches.serve", "a server under load: throughput against waiting, one or two servers"),
    "device": ("plait.cli.benches.device", "the machine's own limits"),
}
