"""What `plait bench` can measure: one file each, imported only when asked for."""

# name -> (module, summary); each module has `measure(settings: BenchSettings) -> Report`
BENCHES: dict[str, tuple[str, str]] = {
    "train": ("plait.cli.benches.train", "a training step: forward, backward, AdamW"),
}
