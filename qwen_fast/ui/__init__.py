"""`qwen-fast ui` and `serve --ui`: a chat page for any server with OpenAI's API.

page.py is the Gradio wiring; everything that it does is in plain modules beside it. Importing this package costs nothing;
the page needs the extra [ui].
"""
