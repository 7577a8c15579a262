"""Views of a trained case: live in the browser, as a report, as pages to send."""
