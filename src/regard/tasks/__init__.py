"""Complete systems by what they are for. ``tasks.common`` holds what several of them need."""
