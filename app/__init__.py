"""The X-LoRA Explorer app: ``streamlit run app/main.py``."""
