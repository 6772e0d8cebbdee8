"""Orders."""

from django.db import models


class Order(models.Model):
    """What somebody bought."""

    item = models.CharField(max_length=100)
    is_confirmed = models.BooleanField(default=False)

    def __str__(self):
        return self.item
