host "*" {
  deny {
    when = "true"
  }
  deny {
    when = use.port
  }
  deny {
    when = 1
  }
  lane "bulk" {
    when = [true]
  }
}
