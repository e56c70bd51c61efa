"""The verbs of the command line: one file each, imported only when called."""

# name -> (module, summary); strings, so that `plait --help` imports none of them
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("plait.cli.demo", "tell the whole story on this machine: train, compare, generate, export, report"),
    "train": ("plait.cli.train", "train a model from a recipe"),
    "sweep": ("plait.cli.sweep", "run a table of training runs and compare them: precisions, learning rates, seeds"),
    "compress": ("plait.cli.compress", "cut a smaller model out of a trained one, to a budget, and distil it"),
    "generate": ("plait.cli.generate", "continue a prompt"),
    "chat": ("plait.cli.chat", "talk with a model in the terminal"),
    "evaluate": ("plait.cli.evaluate", "score a model on evaluation sets, above chance"),
    "serve": ("plait.cli.serve", "answer OpenAI's routes and show a chat page"),
    "info": ("plait.cli.info", "show a model's layers, parameters, bytes and cost without loading it"),
    "plan": ("plait.cli.plan", "say what a model needs of a machine, and how fast it can be, before it runs"),
    "convert": ("plait.cli.convert", "write a checkpoint in another format"),
    "tokenize": ("plait.cli.tokenize", "turn text into token shards"),
    "doctor": ("plait.cli.doctor", "say what works on this machine and what would make it faster"),
    "bench": ("plait.cli.bench", "measure speed and memory"),
}
