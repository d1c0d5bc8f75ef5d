"""The Gradio app: `mole app`. What it does lies in plain modules; `interface` and `tabs` show it."""

#: Name of the thread that draws and trains.
WORKER_THREAD = "mole-worker"
