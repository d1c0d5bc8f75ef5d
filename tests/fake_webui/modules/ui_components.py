"""The hosts' components, as plain gradio ones that behave alike for an extension.

Functions, not classes: gradio writes a .pyi file beside every class that is derived from a component.
"""


class InputAccordion:
    """`with InputAccordion(...) as checkbox`: an accordion with a checkbox of its own."""

    def __init__(self, value, label, elem_id):
        import gradio as gr

        self.checkbox = gr.Checkbox(value, visible=False, label=label, elem_id=f"{elem_id}-checkbox")
        self.accordion = gr.Accordion(label=label, elem_id=elem_id, open=value)

    def __enter__(self):
        self.accordion.__enter__()
        return self.checkbox

    def __exit__(self, *error):
        self.accordion.__exit__(*error)


def ToolButton(value, elem_id, tooltip):
    """A small button; older hosts' gradio knows no tooltip."""
    import gradio as gr

    return gr.Button(value, elem_id=elem_id)
