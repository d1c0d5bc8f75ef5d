"""The Gradio app: `mole app`. What it does lies in plain modules; `interface` and `tabs` show it."""
