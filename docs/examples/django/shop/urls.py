"""The one page, which takes orders."""

from functools import partial

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_POST

from shop.models import Order
from shop.tasks import confirm


@require_POST
@transaction.atomic
def buy(request: HttpRequest, item: str) -> JsonResponse:
    """Take an order."""
    order = Order.objects.create(item=item)
    # Not before the commit: the worker could be quicker, and would not find the order.
    transaction.on_commit(partial(confirm.delay, order.pk))
    if request.GET.get("fail"):
        transaction.set_rollback(True)
    return JsonResponse({"order": order.pk}, status=202)


urlpatterns = [path("buy/<str:item>", buy)]
