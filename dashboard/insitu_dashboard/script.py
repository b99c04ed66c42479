"""What Streamlit runs for each viewer; the pages themselves are in `insitu_dashboard.pages`."""

from insitu_dashboard.pages import run

if __name__ == "__main__":  # as Streamlit runs it
    run()
