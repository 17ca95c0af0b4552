"""Which weights of a model are followed, and what they are: layer, stack, role, heads, axis."""

from __future__ import annotations

from dora_dynamics.sites.catalogue import Granularity as Granularity
from dora_dynamics.sites.catalogue import UnknownAxisError as UnknownAxisError
from dora_dynamics.sites.catalogue import describe_tensor as describe_tensor
from dora_dynamics.sites.catalogue import expand as expand
from dora_dynamics.sites.models import CODES as CODES
from dora_dynamics.sites.models import is_linear as is_linear
from dora_dynamics.sites.models import list_weights as list_weights
from dora_dynamics.sites.models import register_linear as register_linear
from dora_dynamics.sites.models import tensor_names as tensor_names
from dora_dynamics.sites.names import ROLES as ROLES
from dora_dynamics.sites.names import role_of as role_of
from dora_dynamics.sites.select import NoHeadsError as NoHeadsError
from dora_dynamics.sites.select import NoSiteMatchesError as NoSiteMatchesError
from dora_dynamics.sites.select import find_sites as find_sites
from dora_dynamics.sites.select import select_tensors as select_tensors
from dora_dynamics.sites.site import Site as Site
from dora_dynamics.sites.tied import check_ties as check_ties
from dora_dynamics.sites.tied import once as once
from dora_dynamics.sites.tied import other_names as other_names
