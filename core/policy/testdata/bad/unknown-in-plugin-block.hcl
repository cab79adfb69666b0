host "*" {
  confirm {}
  persist {
    idel = "10m"
    max  = "8h"
  }
}
