"""Pages: a single HTML file that contains everything it shows, so that it opens offline."""

from pore._page.building import File as File
from pore._page.building import address as address
from pore._page.building import filled as filled
from pore._page.building import html as html
from pore._page.building import items as items
from pore._page.building import joined as joined
from pore._page.building import part as part
from pore._page.building import picture as picture
from pore._page.charts import Dot as Dot
from pore._page.charts import dots as dots
from pore._page.first import First as First
from pore._page.tables import table as table
