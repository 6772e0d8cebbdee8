"""What runs in the background."""

from shop.background import wakaq
from shop.models import Order


@wakaq.task(queue="orders")
def confirm(order_id: int) -> None:
    """Confirm an order; it gets the key, not the object, and reads what is true when it runs."""
    Order.objects.filter(pk=order_id).update(is_confirmed=True)
